"""The engine: one set of weights on a device, serving sessions."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from ..conditions.actors import actor_mask
from ..conditions.audio_features import ActorFeatures, Features, WindowedFeatures, window_samples
from ..conditions.audio_window import AudioWindow
from ..conditions.pose import PoseStream
from ..conditions.speech import LiveSpeech
from ..conditions.still import StillCache, to_pixels
from ..config import EngineConfig, StreamGeometry
from ..config.engine import DEFAULT_SEED
from ..config.fit import TYPICAL_SIDES
from ..config.geometry import FRAMES_PER_SECOND
from ..denoise.executor import StepExecutor
from ..denoise.noise import check_seed
from ..denoise.stream import Conditions, SinkPolicy
from ..errors import ConfigError, InputError, LiveAvatarError
from ..runtime.graphs import recorder
from ..weights.network import LoadProgress
from . import inputs
from .assembly import assemble
from .device import graphs_absent
from .encoders import Encoders
from .one_device import OneDevice
from .precision import LayerLoss, measured_losses
from .runner import Runner, StreamOrder, WorkerInfo
from .session import Session
from .source import Files
from .tpp.job import Job
from .tpp.many_devices import ManyDevices
from .tpp.trace import write_chrome_trace

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Scene:
    """What a session shows, read and checked.

    Attributes:
        geometry: of the stream.
        pixels: the portrait, float32 [3, height, width] in [-1, 1].
        prompt, seed: as given.
        actor_mask: [actors, 1, tokens_per_frame, 1] on the device, or None.
        pose: of a pose video, or None.
    """

    geometry: StreamGeometry
    pixels: Tensor
    prompt: str
    seed: int
    actor_mask: Tensor | None
    pose: PoseStream | None


class Engine:
    """A loaded checkpoint, ready to serve. Make one with `from_pretrained`, and `close` it, or use it in a `with`."""

    def __init__(self, config: EngineConfig, runner: Runner, encoders: Encoders, trace: Path | None = None) -> None:
        """Put loaded parts together: what makes blocks, and what encodes their conditions."""
        self.config, self._trace = config, trace
        self._runner, self._encoders = runner, encoders
        self._lock = threading.Lock()
        self._window: AudioWindow | None = None
        self._stills = StillCache(encoders.vae)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        lora: str | Path | None = None,
        config: EngineConfig | None = None,
        progress: LoadProgress | None = None,
        *,
        vae: str | Path | None = None,
        trace: str | Path | None = None,
        lora_scale: float | None = None,
        join_job: bool = True,
    ) -> Self:
        """Load a checkpoint directory, original or converted, merging a LoRA adapter where one is given.

        `progress` is called with the tensors of the network loaded so far and to be loaded. `vae` is a file with the
        weights of a light decoder (docs/light-decoder.md), which makes frames in place of the checkpoint's VAE. With
        several devices, `trace` is a file that gets a timeline of all of them when the engine is closed.
        `lora_scale` is the adapter's alpha / rank, if it is not to be what its file says.

        Several devices have a worker process each. In a torchrun job these are the job's processes: this returns in the
        first one, and in all others it serves that one's engines until it ends, and then exits. Without `join_job`, the
        engine starts workers of its own there, too, and the job's processes go their own ways.

        Raises:
            CheckpointError: parts are missing or damaged or do not fit together; nothing has been allocated for the
                network by then.
            ConfigError: the device or precision asked for is not there or contradicts a converted checkpoint, or
                LIVEAVATAR_KERNELS names no kernels.
            WorkerError: a worker process has ended.
            DeviceMemoryError: the device or the host has too little memory free; nothing has been allocated.
        """
        source = Files(Path(checkpoint), _path(lora), _path(vae), lora_scale)
        job = Job.current() if join_job else None
        parts = assemble(source, config or EngineConfig(), progress, job, trace=trace is not None)
        return cls(parts.config, parts.runner, parts.encoders, _path(trace))

    @property
    def device(self) -> torch.device:
        """Where conditions are encoded."""
        return self._encoders.audio.device

    @property
    def runner(self) -> Runner:
        """What makes blocks, for those who order streams that `generate` does not make."""
        return self._runner

    @property
    def encoders(self) -> Encoders:
        """What encodes the conditions of streams."""
        return self._encoders

    @property
    def executor(self) -> StepExecutor | None:
        """What runs the denoise steps in this process, once `warm_up` or a session has made it."""
        return self._runner.executor if isinstance(self._runner, OneDevice) else None

    def workers(self) -> list[WorkerInfo]:
        """The processes that work for this engine, by rank; none on a single device."""
        return self._runner.workers()

    @property
    def failure(self) -> LiveAvatarError | None:
        """Why sessions end with an error and none can be opened: a worker process has failed. None: all is well."""
        return self._runner.failure

    def restart(self) -> None:
        """Start the worker processes again, after one has failed, or at any time: sessions that are open end.

        Raises:
            ConfigError: there are none, on a single device.
            LiveAvatarError: what a worker could not do; none is left running.
        """
        if not isinstance(self._runner, ManyDevices):
            raise ConfigError("restart: an engine on one device has no workers")
        self._runner.restart()

    def drain(self) -> None:
        """Begin no further block: sessions end, as if their audio did, when the blocks under way are delivered."""
        self._runner.drain()

    def close(self) -> None:
        """End all sessions, and the engine's worker processes; a second call does nothing.

        Raises:
            OutputError: the trace cannot be written; everything has ended all the same.
        """
        runner = self._runner
        if self._trace is not None and isinstance(runner, ManyDevices):
            spans, path, self._trace = runner.spans(), self._trace, None
            runner.close()
            write_chrome_trace(path, spans, runner.plan)
        runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def warm_up(self, picture: tuple[int, int] = TYPICAL_SIDES, *, actors: int = 1, masked: bool | None = None) -> None:
        """Allocate all caches, compile and choose kernels, and capture the denoise steps as CUDA graphs.

        The first session does the same, for its own picture, and takes so much longer. After it, opening a session,
        other audio, a new prompt and the sink's update neither allocate caches nor capture anything.

        Args:
            picture: height and width of the pictures to come; their ratio counts where the configured size is an area.
            actors: of the sessions to come.
            masked: whether there are actor masks; None: with several actors.

        Raises:
            ConfigError: the size does not fit the model.
            SessionError: sessions of another size are open, or all slots are taken.
        """
        height, width = self.config.parsed_size.sides(*picture)
        geometry = self._geometry(height, width)
        self._runner.warm_up(geometry, actors, actors > 1 if masked is None else masked)
        self._audio_window(geometry)
        list(self._encoders.vae.encode(torch.zeros(1, 3, geometry.height, geometry.width)))

    def generate(
        self,
        image: str | Path | Image.Image | np.ndarray,
        audio: inputs.AudioInput | Sequence[inputs.AudioInput],
        prompt: str = "",
        *,
        seed: int = DEFAULT_SEED,
        pose_video: str | Path | None = None,
        actor_masks: Sequence[str | Path | np.ndarray] | None = None,
        max_blocks: int | None = None,
    ) -> Session:
        """Animate an image with recorded speech: iterate over the result for `FrameChunk`s as they are made.

        Inputs are read and checked before this returns; memory does not grow with the audio's length.

        Args:
            image: a file, a PIL image, or uint8 RGB [height, width, 3].
            audio: a file, or float32/int16 mono samples at 16 kHz; several actors: a sequence of them.
            prompt: what the scene shows.
            seed: of noise and sink distances; the same seed gives the same frames, bit for bit.
            pose_video: a file whose frames steer the pose.
            actor_masks: where each actor is, one per actor: files, or arrays [height, width] of the stream's size.
            max_blocks: end after so many blocks of 0.48 s.

        Raises:
            InputError, ConfigError: an input cannot be used.
            SessionError: `max_sessions` sessions are open.
        """
        if max_blocks is not None and (not isinstance(max_blocks, int) or max_blocks < 1):
            raise ConfigError(f"max_blocks must be an integer, at least 1, not {max_blocks!r}")
        actors = 1 if isinstance(audio, inputs.AudioInput) else len(audio)
        scene = self._scene(image, prompt, seed, actors, actor_masks, pose_video)
        features = inputs.recorded_features(
            audio,
            self._encoders.audio,
            self.config.features,
            scene.geometry.columns_per_block,
            lambda: self._audio_window(scene.geometry),
        )
        return self._open(scene, features, live=[], max_blocks=max_blocks)

    def precision_losses(
        self,
        image: str | Path | Image.Image | np.ndarray,
        audio: inputs.AudioInput | Sequence[inputs.AudioInput],
        prompt: str = "",
        *,
        max_blocks: int = 1,
    ) -> list[LayerLoss]:
        """Measure what each linear layer would lose in e4m3 while a stream's first blocks are made.

        Arguments and errors as for `generate`.

        Returns:
            The layers, the one that loses most first; those that `generate` does not call are not among them.

        Raises:
            ConfigError: the engine's own layers are in e4m3, or it replays graphs, which call no layer, or its layers
                are in other processes.
        """
        runner = self._runner
        if not isinstance(runner, OneDevice):
            raise ConfigError("losses are measured on one device: open the engine with one")
        if runner.graphs:
            raise ConfigError("captured graphs call no layer that could be measured: open the engine with graphs=False")
        if self.config.precision == "fp8":
            raise ConfigError("precision fp8 leaves nothing to compare with: measure with bf16 or fp32")
        with (
            measured_losses(runner.network, self.config.fp8_skip) as losses,
            self.generate(image, audio, prompt, max_blocks=max_blocks) as session,
        ):
            for _ in session:
                pass
        return losses

    def open_session(
        self,
        image: str | Path | Image.Image | np.ndarray,
        prompt: str = "",
        *,
        seed: int = DEFAULT_SEED,
        pose_video: str | Path | None = None,
        actor_masks: Sequence[str | Path | np.ndarray] | None = None,
    ) -> Session:
        """Open a live session: push audio into it while its frames are read.

        Audio states are "windowed" whatever the configuration says: the utterance's length is unknown. With
        `actor_masks` there is one actor per mask. Other arguments and errors as for `generate`.
        """
        live = [LiveSpeech() for _ in range(len(actor_masks or ()) or 1)]
        scene = self._scene(image, prompt, seed, len(live), actor_masks, pose_video)
        per_block = scene.geometry.columns_per_block
        window = self._audio_window(scene.geometry)
        features = ActorFeatures([WindowedFeatures(self._encoders.audio, speech, per_block, window) for speech in live])
        return self._open(scene, features, live, max_blocks=None)

    def _scene(
        self,
        image: str | Path | Image.Image | np.ndarray,
        prompt: str,
        seed: int,
        actors: int,
        masks: Sequence[str | Path | np.ndarray] | None,
        pose_video: str | Path | None,
    ) -> _Scene:
        """Read and check everything but the audio."""
        seed = check_seed(seed)
        if not isinstance(prompt, str):
            raise InputError(f"prompt: expected text, not {type(prompt).__name__}")
        if (actors > 1 or masks is not None) and len(masks or ()) != actors:
            raise InputError(f"{actors} audio tracks and {len(masks or ())} actor masks: expected one mask per track")
        picture = inputs.portrait(image, self.config.parsed_size)
        height, width, _ = picture.shape
        geometry = self._geometry(height, width)
        mask = pose = None
        if masks is not None:
            mask = actor_mask(inputs.actor_masks(masks, height, width), geometry).to(self.device)
        if pose_video is not None:
            frames = inputs.pose_frames(pose_video, height, width, FRAMES_PER_SECOND)
            pose = PoseStream(self._encoders.vae, frames, geometry)
        return _Scene(geometry, to_pixels(picture), prompt, seed, mask, pose)

    def _open(self, scene: _Scene, features: Features, live: list[LiveSpeech], max_blocks: int | None) -> Session:
        """Encode the portrait and the prompt, and begin a stream."""
        still = self._stills.conditions(scene.pixels, self.device)
        context = self._encode_prompt(scene.prompt)
        conditions = Conditions(context, still.reference, still.motion, scene.actor_mask)
        policy = SinkPolicy(self.config.sink_distance, self.config.sink_update_after, scene.seed)
        order = StreamOrder(scene.geometry, conditions, policy, still.priming, features, scene.pose, max_blocks)
        return Session(self._runner.open(order), live, self._encode_prompt)

    def _geometry(self, height: int, width: int) -> StreamGeometry:
        return StreamGeometry(self._runner.model, height, width, motion_tokens=self.config.motion_tokens)

    def _audio_window(self, geometry: StreamGeometry) -> AudioWindow:
        """What encodes a block's window of speech, for all sessions; it does not depend on the picture's size."""
        with self._lock:
            if self._window is None:
                columns = geometry.columns_per_block
                graphs = self.config.graphs and graphs_absent(self.device) is None
                record_with = recorder(self.device, graphs)
                self._window = AudioWindow(self._encoders.audio, window_samples(columns), columns, record_with)
            return self._window

    def _encode_prompt(self, prompt: str) -> Tensor:
        if not isinstance(prompt, str):
            raise InputError(f"prompt: expected text, not {type(prompt).__name__}")
        return self._encoders.text.context(prompt, self._runner.model.text_len)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
