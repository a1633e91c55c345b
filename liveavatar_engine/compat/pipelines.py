"""`generate` of the reference's three pipelines, each of which makes video in its own way (docs/migration.md)."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..conditions.audio_features import Features
from ..conditions.pose import PoseStream
from ..conditions.still import MOTION_SOURCE_FRAMES, REFERENCE_FRAMES, still_conditions
from ..config.geometry import LATENT_FRAME_STRIDE
from ..denoise.stream import Conditions, SinkPolicy
from ..errors import ConfigError
from ..model.network import MOTION_FRAMES
from ..pipeline.engine import Engine
from ..pipeline.production import PORTRAIT_FRAMES
from ..pipeline.runner import StreamOrder
from ..pipeline.session import Session
from .arguments import Arguments, BlockwiseArguments, TppArguments, taking
from .base import Pipeline
from .callback import Callback, callback_of
from .clips import ClipVideo
from .columns import NoiseFirst, called_samples
from .devices import Layout, one_device, pipeline_layout, processes
from .inputs import Inputs
from .ranks import Ranks

_ABOVE = 0.01
"""Of a level of 255 by which values lie above it; see `as_video`."""


class WanS2V(Pipeline):
    """The single-GPU pipeline: each clip is decoded behind the video before it, encoded again.

    The reference image stays in the sink, unless `enable_online_decode` renews it, and the motion with it, after the
    first clip.
    """

    @taking(Arguments)
    def generate(self, arguments: Arguments) -> tuple[Tensor | None, dict[str, Any]]:
        """A portrait and speech as a video.

        Returns:
            float32 [3, frames, height, width] in [-1, 1], on the CPU; None but on rank 0. And an empty dictionary.

        Raises:
            InputError, ConfigError: an argument cannot be used; nothing has been loaded by then.
            CheckpointError, DeviceMemoryError: at the first call, of what is loaded.
        """
        inputs = self._read(arguments, arguments.num_repeat)
        engine = self._engine(one_device(self.device_id), arguments, inputs)
        video = ClipVideo(
            self._backend.clip_maker(engine, inputs.geometry),
            inputs,
            self._backend.context(engine, inputs.prompt),
            self._spoken(engine, inputs),
            self._pose(engine, arguments, inputs),
            distance=self.sink_distance,
            renew=arguments.enable_online_decode,
            observe=self.observe,
        )
        whole = _Whole(inputs)
        try:
            for frames in video.frames():
                whole.add(frames)
        finally:
            video.close()
        return whole.video if self.rank == 0 else None, {}


class _Streaming(Pipeline):
    """Decoded as it is made; the first latent becomes the sink's reference after the first clip."""

    _reference_frames = REFERENCE_FRAMES
    _source_frames = MOTION_SOURCE_FRAMES
    _ranks: Ranks | None = None

    def _job(self) -> Ranks | None:
        """The job of several processes that this one is part of."""
        if self._ranks is None and processes() > 1:
            self._ranks = Ranks()
        return self._ranks

    def _stream(
        self, engine: Engine, inputs: Inputs, features: Features, pose: PoseStream | None, clips: int
    ) -> Generator[Tensor]:
        """Frames block by block, float32 [3, frames, height, width] in [-1, 1]."""
        pixels = inputs.pixels.to(engine.device)
        still = still_conditions(engine.encoders.vae, pixels, self._reference_frames, self._source_frames)
        order = StreamOrder(
            inputs.geometry,
            Conditions(self._backend.context(engine, inputs.prompt), still.reference, still.motion, inputs.mask),
            SinkPolicy(self.sink_distance, inputs.geometry.blocks_per_clip, inputs.seed),
            still.priming,
            features,
            pose,
            clips * inputs.geometry.blocks_per_clip,
        )
        with Session(engine.runner.open(order), [], lambda prompt: self._backend.context(engine, prompt)) as session:
            for chunk in session:
                if self.observe is not None and session.last_latents is not None:
                    self.observe(chunk.index, session.last_latents)
                yield as_video(chunk.frames)


class TppWanS2V(_Streaming):
    """The TPP pipeline: the picture is encoded as a single frame, the motion as 73 of it."""

    _reference_frames = 1
    _source_frames = MOTION_FRAMES

    @taking(TppArguments)
    def generate(self, arguments: TppArguments) -> tuple[Tensor | None, dict[str, Any]]:
        """As `WanS2V.generate`; in a job of several processes, the video is returned where the reference returns it.

        Raises:
            InputError, ConfigError, ...: as `WanS2V.generate`; in a job, on all ranks.
        """
        ranks = self._job()
        layout = pipeline_layout(self.device_id, ranks, arguments.num_gpus_dit, arguments.enable_vae_parallel)
        if ranks is None:
            return self._video(layout, arguments), {}
        return ranks.video(lambda: self._video(layout, arguments), layout.receiver), {}

    def _video(self, layout: Layout, arguments: TppArguments) -> Tensor:
        inputs = self._read(arguments, arguments.num_repeat)
        engine = self._engine(layout, arguments, inputs)
        features = self._spoken(engine, inputs)
        whole = _Whole(inputs)
        for frames in self._stream(engine, inputs, features, self._pose(engine, arguments, inputs), inputs.clips):
            whole.add(frames)
        return whole.video


class BlockwiseWanS2V(_Streaming):
    """The live pipeline: an iterator of chunks, one per block, which plays a file or listens to a callback.

    Attributes:
        get_audio_callback: returns the next samples, float32 or int16 mono at 16 kHz, any number, and None at the end.
            It is called as often as blocks need it, in a job on the rank that gets the chunks, as in the reference,
            and on a thread of its own. None: `audio_path` is played.
        noise_clips: clips of random audio states before the speech; the reference has 3.
    """

    get_audio_callback: Callback | None = None
    noise_clips: int = 0

    def encode_audio_from_array(self, audio_array: np.ndarray, infer_frames: int) -> tuple[Tensor, int]:
        """As `encode_audio`, of samples: float32 or int16 mono at 16 kHz."""
        features = self.audio_encoder.extract_audio_feat_from_array(audio_array, return_all_layers=True)
        return self._columns(features, infer_frames)

    @taking(BlockwiseArguments)
    def generate(self, arguments: BlockwiseArguments) -> Iterator[Tensor | None]:
        """A portrait and speech as video, block by block.

        Ends with the speech or after `max_repeat` clips; `num_repeat` does not count, as in the reference. In a job of
        several processes all must iterate; where one stops, the stream ends for all.

        Yields:
            float32 [1, 3, frames, height, width] in [-1, 1], on the CPU: 9 frames at first, then 12. In a job, on the
            rank where the reference decodes; as many None on the others.

        Raises:
            InputError, ConfigError: an argument cannot be used; nothing has been loaded by then.
            CheckpointError, DeviceMemoryError, ...: from the iterator, of what is loaded and made. In a job, all of
                them on all ranks.
        """
        ranks = self._job()
        layout = pipeline_layout(self.device_id, ranks, arguments.num_gpus_dit, arguments.enable_vae_parallel)
        if ranks is None:
            callback = self.get_audio_callback
            return self._chunks(layout, arguments, self._live_inputs(arguments, callback is not None), callback)
        listens = self._listens(ranks, layout.receiver)
        inputs = ranks.first(lambda: self._live_inputs(arguments, listens))
        return self._shared_chunks(ranks, layout, arguments, inputs, listens)

    def _live_inputs(self, arguments: BlockwiseArguments, listens: bool) -> Inputs:
        if not isinstance(self.noise_clips, int) or self.noise_clips < 0:
            raise ConfigError(f"noise_clips must be an integer, at least 0, not {self.noise_clips!r}")
        return self._read(arguments, None, listens=listens)

    def _listens(self, ranks: Ranks, receiver: int) -> bool:
        """Whether a job listens, to the rank that gets the chunks."""
        listening = ranks.which(self.get_audio_callback is not None)
        if listening and receiver not in listening:
            raise ConfigError(
                f"get_audio_callback is set on rank {listening[0]}, but rank {receiver} gets the chunks and is asked "
                "for audio: set it there"
            )
        return bool(listening)

    def _chunks(
        self, layout: Layout, arguments: BlockwiseArguments, inputs: Inputs, callback: Callback | None
    ) -> Generator[Tensor]:
        engine = self._engine(layout, arguments, inputs)
        pose = self._pose(engine, arguments, inputs, _FirstOfClip)
        clips = min(inputs.clips + self.noise_clips, arguments.max_repeat)
        with closing(self._stream(engine, inputs, self._features(engine, inputs, callback), pose, clips)) as stream:
            for frames in stream:
                yield frames[None]

    def _shared_chunks(
        self, ranks: Ranks, layout: Layout, arguments: BlockwiseArguments, inputs: Inputs | None, listens: bool
    ) -> Generator[Tensor | None]:
        """The chunks of a job; `inputs` are the first rank's, which makes them."""
        with callback_of(ranks, layout.receiver, self.get_audio_callback) if listens else nullcontext() as callback:
            made = None if inputs is None else self._chunks(layout, arguments, inputs, callback)
            yield from ranks.chunks(made, layout.receiver)

    def _features(self, engine: Engine, inputs: Inputs, callback: Callback | None) -> Features:
        speech = (
            self._spoken(engine, inputs)
            if callback is None
            else self._backend.heard(engine, inputs, called_samples(callback))
        )
        if not self.noise_clips:
            return speech
        model, geometry = self.noise_model.config, inputs.geometry
        shape = (1, model.audio_layers, model.audio_dim, geometry.columns_per_block)
        return NoiseFirst(speech, shape, self.noise_clips * geometry.blocks_per_clip, inputs.seed)


class _FirstOfClip(PoseStream):
    """The pose of each clip's first block for all of its blocks, as the reference's live pipeline has it."""

    def block(self, index: int) -> Tensor:
        blocks = self._geometry.blocks_per_clip
        return super().block(index // blocks * blocks)


class _Whole:
    """A video whose length is known, filled piece by piece."""

    def __init__(self, inputs: Inputs) -> None:
        frames = inputs.clips * inputs.geometry.ring_frames * LATENT_FRAME_STRIDE - PORTRAIT_FRAMES
        self._video = torch.zeros(3, frames, inputs.geometry.height, inputs.geometry.width)
        self._filled = 0

    def add(self, frames: Tensor) -> None:
        """Append float32 [3, frames, height, width]."""
        stop = self._filled + frames.shape[1]
        self._video[:, self._filled : stop] = frames
        self._filled = stop

    @property
    def video(self) -> Tensor:
        """What has been filled."""
        return self._video[:, : self._filled]


def as_video(frames: np.ndarray) -> Tensor:
    """uint8 [frames, height, width, 3] -> float32 [3, frames, height, width] in [-1, 1].

    Values lie a hundredth of a level above, so that scripts that cut off digits on their way to uint8 get the same
    frames again.
    """
    levels = torch.from_numpy(frames).permute(3, 0, 1, 2).float()
    return ((levels + _ABOVE) / 127.5 - 1).clamp(max=1)
