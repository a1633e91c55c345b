"""The engine: one set of weights on a device, serving sessions."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from ..conditions.actors import actor_mask
from ..conditions.audio_encoder import AudioEncoder
from ..conditions.audio_features import ActorFeatures, Features, WindowedFeatures, window_samples
from ..conditions.audio_window import AudioWindow
from ..conditions.pose import PoseStream
from ..conditions.speech import LiveSpeech
from ..conditions.still import StillCache, to_pixels
from ..conditions.text import TextEncoder
from ..config import EngineConfig, StreamGeometry
from ..config.engine import DEFAULT_SEED
from ..config.fit import TYPICAL_SIDES
from ..config.geometry import FRAMES_PER_SECOND
from ..denoise.diagonal import open_stream
from ..denoise.executor import Denoiser, StepExecutor
from ..denoise.noise import BlockNoise, check_seed
from ..denoise.schedule import flow_match_schedule
from ..denoise.stream import Conditions, SinkPolicy
from ..errors import CheckpointError, ConfigError, InputError, SessionError
from ..model import Network
from ..runtime.graphs import recorder
from ..vae.light import LightDecoder, load_decoder
from ..vae.vae import Vae
from ..weights.budget import require_memory
from ..weights.conversion import settled
from ..weights.layout import Checkpoint
from ..weights.network import LoadProgress, load_network
from . import inputs
from .decoders import Decoders
from .device import graphs_absent, log_kernels, resolve_device, resolve_precision
from .offload import fetchers, load_offloadable_vae
from .precision import LayerLoss, measured_losses
from .production import ProductionParts
from .session import Session, SessionParts

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
    """A loaded checkpoint, ready to serve. Make one with `from_pretrained`."""

    def __init__(
        self,
        config: EngineConfig,
        network: Network,
        vae: Vae,
        text_encoder: TextEncoder,
        audio_encoder: AudioEncoder,
        decoder: Vae | LightDecoder | None = None,
    ) -> None:
        """Put loaded parts together. `decoder` makes frames in place of the VAE's own."""
        self.config = config
        self._cache_dtype = resolve_precision(config, network.device).cache
        self._graphs = config.graphs and graphs_absent(network.device) is None
        self._network, self._vae = network, vae
        self._text_encoder, self._audio_encoder = text_encoder, audio_encoder
        schedule = flow_match_schedule(config.steps)
        self._denoiser = Denoiser(network, schedule, clean_pass=config.kv_mode == "clean")
        self._lock = threading.RLock()  # sessions may be collected, and give their slot back, while it is held
        self._free_slots = list(range(config.max_sessions))
        self._executor: StepExecutor | None = None
        self._window: AudioWindow | None = None
        self._stills = StillCache(vae)
        self._decoders = Decoders(decoder or vae, self.device, self._graphs, config.frames)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        lora: str | Path | None = None,
        config: EngineConfig | None = None,
        progress: LoadProgress | None = None,
        *,
        vae: str | Path | None = None,
    ) -> Self:
        """Load a checkpoint directory, original or converted, merging a LoRA adapter where one is given.

        `progress` is called with the tensors of the network loaded so far and to be loaded. `vae` is a file with the
        weights of a light decoder (docs/light-decoder.md), which makes frames in place of the checkpoint's VAE.

        Raises:
            CheckpointError: parts are missing or damaged or do not fit together; nothing has been allocated for the
                network by then.
            ConfigError: the device or precision asked for is not there or contradicts a converted checkpoint, or
                LIVEAVATAR_KERNELS names no kernels.
            DeviceMemoryError: the device or the host has too little memory free; nothing has been allocated.
        """
        device = resolve_device((config or EngineConfig()).devices)
        log_kernels(device)
        found, adapter = Checkpoint(Path(checkpoint)), Path(lora) if lora is not None else None
        config = settled(config or EngineConfig(), found.root, adapter)
        require_memory(found, config, device)
        precision = resolve_precision(config, device)
        dtype, offload = precision.dtype, fetchers(config, device)
        _log.info("loading %s as %s on %s", found.root, dtype, device)
        audio_encoder = AudioEncoder.load(found.audio_encoder, device)
        text_encoder = TextEncoder.load(found.text_encoder, found.tokenizer, dtype, device, offload.get("text_encoder"))
        decoder = None if vae is None else load_decoder(Path(vae), precision.decoder, device)
        wan = load_offloadable_vae(found.vae, precision.decoder, device, offload.get("vae"))
        network = load_network(found.root, adapter, dtype, device, progress, precision.fp8_skip)
        sizes = (audio_encoder.state_count, audio_encoder.state_dim)
        if sizes != (network.config.audio_layers, network.config.audio_dim):
            raise CheckpointError(
                f"{found.audio_encoder}: {sizes[0]} states of {sizes[1]}; the network was made for "
                f"{network.config.audio_layers} of {network.config.audio_dim}"
            )
        return cls(config, network, wan, text_encoder, audio_encoder, decoder)

    @property
    def device(self) -> torch.device:
        return self._network.device

    @property
    def executor(self) -> StepExecutor | None:
        """What runs the denoise steps, once `warm_up` or a session has made it."""
        return self._executor

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
        geometry = StreamGeometry(self._network.config, height, width, motion_tokens=self.config.motion_tokens)
        slot, executor = self._take_slot(geometry)
        try:
            executor.warm_up(actors, actors > 1 if masked is None else masked, slot)
            self._audio_window(geometry)
            self._decoders.stream(geometry).close()
            list(self._vae.encode(torch.zeros(1, 3, geometry.height, geometry.width)))
        finally:
            self._give_slot_back(slot)

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
            self._audio_encoder,
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
            ConfigError: the engine's own layers are in e4m3, or it replays graphs, which call no layer.
        """
        if self._graphs:
            raise ConfigError("captured graphs call no layer that could be measured: open the engine with graphs=False")
        if self.config.precision == "fp8":
            raise ConfigError("precision fp8 leaves nothing to compare with: measure with bf16 or fp32")
        with (
            measured_losses(self._network, self.config.fp8_skip) as losses,
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
        features = ActorFeatures([WindowedFeatures(self._audio_encoder, speech, per_block, window) for speech in live])
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
        geometry = StreamGeometry(self._network.config, height, width, motion_tokens=self.config.motion_tokens)
        mask = pose = None
        if masks is not None:
            mask = actor_mask(inputs.actor_masks(masks, height, width), geometry).to(self.device)
        if pose_video is not None:
            pose = PoseStream(self._vae, inputs.pose_frames(pose_video, height, width, FRAMES_PER_SECOND), geometry)
        return _Scene(geometry, to_pixels(picture), prompt, seed, mask, pose)

    def _open(self, scene: _Scene, features: Features, live: list[LiveSpeech], max_blocks: int | None) -> Session:
        """Encode the portrait and the prompt, take a slot and prefill its sink."""
        still = self._stills.conditions(scene.pixels, self.device)
        context = self._encode_prompt(scene.prompt)
        conditions = Conditions(context, still.reference, still.motion, scene.actor_mask)
        policy = SinkPolicy(self.config.sink_distance, self.config.sink_update_after, scene.seed)
        slot, executor = self._take_slot(scene.geometry)
        with ExitStack() as opened:
            opened.callback(self._give_slot_back, slot)
            latents = open_stream(executor, slot, conditions, policy)
            opened.callback(latents.close)
            decoder = self._decoders.stream(scene.geometry)
            opened.callback(decoder.close)
            decoder.skip(still.priming)
            decoder.check()
            release = opened.pop_all().close
        production = ProductionParts(
            scene.geometry,
            features,
            BlockNoise(scene.geometry, scene.seed),
            latents,
            decoder,
            scene.pose,
            early_first_frame=self.config.early_first_frame,
            overlap=self.device.type == "cuda",
        )
        parts = SessionParts(production, live, self._encode_prompt)
        return Session(parts, release, max_blocks)

    def _audio_window(self, geometry: StreamGeometry) -> AudioWindow:
        """What encodes a block's window of speech, for all sessions; it does not depend on the picture's size."""
        with self._lock:
            if self._window is None:
                columns = geometry.columns_per_block
                record_with = recorder(self.device, self._graphs)
                self._window = AudioWindow(self._audio_encoder, window_samples(columns), columns, record_with)
            return self._window

    def _encode_prompt(self, prompt: str) -> Tensor:
        if not isinstance(prompt, str):
            raise InputError(f"prompt: expected text, not {type(prompt).__name__}")
        return self._text_encoder.context(prompt, self._network.config.text_len)

    def _take_slot(self, geometry: StreamGeometry) -> tuple[int, StepExecutor]:
        """A free slot, in buffers that are made at the first session and when the size changes between sessions."""
        with self._lock:
            if not self._free_slots:
                raise SessionError(
                    f"all {self.config.max_sessions} sessions are open: close one, or set EngineConfig.max_sessions"
                )
            executor = self._executor_for(geometry)
            return self._free_slots.pop(), executor

    def _executor_for(self, geometry: StreamGeometry) -> StepExecutor:
        if self._executor is None or self._executor.geometry != geometry:
            if len(self._free_slots) < self.config.max_sessions:
                raise SessionError("sessions of another picture size are open; sizes cannot be mixed in an engine")
            self._executor = None
            self._executor = StepExecutor(
                self._denoiser,
                geometry,
                sessions=self.config.max_sessions,
                cache_dtype=self._cache_dtype,
                graphs=self._graphs,
                diagonal=self.config.schedule == "diagonal",
            )
        return self._executor

    def _give_slot_back(self, slot: int) -> None:
        with self._lock:
            self._free_slots.append(slot)
