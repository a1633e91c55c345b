"""The single-GPU pipeline's way to frames: clip by clip, each decoded behind the video before it, encoded again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..conditions.audio_features import Features
from ..conditions.pose import PoseStream
from ..conditions.still import REFERENCE_FRAMES
from ..config import StreamGeometry
from ..config.geometry import LATENT_FRAME_STRIDE, MOTION_LATENTS
from ..denoise.diagonal import open_stream
from ..denoise.executor import Denoiser, StepExecutor
from ..denoise.noise import BlockNoise
from ..denoise.schedule import flow_match_schedule
from ..denoise.stream import Conditions, LatentStream, SinkPolicy
from ..model.network import MOTION_FRAMES
from ..pipeline.device import resolve_precision
from ..pipeline.engine import Engine
from ..pipeline.one_device import OneDevice
from ..pipeline.production import PORTRAIT_FRAMES
from ..runtime.graphs import recorder
from ..vae.block_decoder import BlockDecoder
from ..vae.vae import Vae
from .inputs import Inputs

MEMORY_FRAMES = MOTION_FRAMES * REFERENCE_FRAMES
"""Video frames that are encoded as motion: 365."""
Observer = Callable[[int, Tensor], None]
"""Called with each block's number and latents."""


class ClipMaker:
    """The buffers of one engine and one geometry."""

    def __init__(self, engine: Engine, geometry: StreamGeometry) -> None:
        runner = engine.runner
        assert isinstance(runner, OneDevice)
        self.engine, self.geometry = engine, geometry
        self.executor = StepExecutor(
            Denoiser(runner.network, flow_match_schedule(engine.config.steps)),
            geometry,
            cache_dtype=resolve_precision(engine.config, engine.device).cache,
            graphs=runner.graphs,
        )
        self.vae: Vae = engine.encoders.vae
        rows, columns, latents = geometry.latent_height, geometry.latent_width, geometry.frames_per_block
        record_with = recorder(engine.device, runner.graphs)
        self._decoder = BlockDecoder(self.vae, rows, columns, latents, record_with, self.vae.conv2.weight.dtype)

    def decode(self, motion: Tensor, latents: Tensor) -> Tensor:
        """Frames of a clip behind motion latents: float32 [3, frames, height, width] in [-1, 1], on the CPU."""
        stream = self._decoder.stream()
        stream.skip(motion)
        frames = stream.decode(latents).permute(3, 0, 1, 2).float().clamp(-1, 1).cpu()
        stream.close()
        return frames


class Memory:
    """The video before a clip, the portrait at first, and its latents: motion of the sink, and what a decoder sees.

    Args:
        vae: that encodes it.
        pixels: the portrait, float32 [3, height, width] in [-1, 1], on the CPU.
        device: where it is encoded.

    Attributes:
        motion: its latents, [channels, 92, latent_height, latent_width].
    """

    def __init__(self, vae: Vae, pixels: Tensor, device: torch.device) -> None:
        self._vae = vae
        self._frames = pixels[:, None].expand(-1, MEMORY_FRAMES, -1, -1)
        self.motion = vae.encode_still(pixels.to(device), 1 + (MEMORY_FRAMES - 1) // LATENT_FRAME_STRIDE)

    def take(self, frames: Tensor) -> None:
        """Let the last of these frames, float32 [3, frames, height, width], at most 73, push out the oldest."""
        count = min(MOTION_FRAMES, frames.shape[1])
        self._frames = torch.cat((self._frames[:, count:], frames[:, -count:]), dim=1)
        self.motion = torch.stack(list(self._vae.encode(self._frames.unbind(1))), dim=1)


class ClipVideo:
    """One video.

    Args:
        maker: with its buffers.
        inputs: what it is made of.
        context: of the prompt, [tokens, text_dim].
        features: audio states of all its clips.
        pose: of a pose video, or None.
        distance: of the sink.
        renew: whether the first clip's latents and frames become the sink's reference and motion.
        observe: called with every block's latents.
    """

    def __init__(
        self,
        maker: ClipMaker,
        inputs: Inputs,
        context: Tensor,
        features: Features,
        pose: PoseStream | None,
        *,
        distance: str | int,
        renew: bool,
        observe: Observer | None = None,
    ) -> None:
        self._maker, self._inputs, self._features, self._pose = maker, inputs, features, pose
        self._renew, self._observe = renew, observe
        self._memory = Memory(maker.vae, inputs.pixels, maker.engine.device)
        still = self._memory.motion
        conditions = Conditions(context, still[:, 1:2], still[:, -MOTION_LATENTS:], inputs.mask)
        self._noise = BlockNoise(inputs.geometry, inputs.seed)
        self._stream: LatentStream = open_stream(maker.executor, 0, conditions, SinkPolicy(distance, None, inputs.seed))

    def frames(self) -> Iterator[Tensor]:
        """The video clip by clip: float32 [3, frames, height, width] in [-1, 1], on the CPU.

        All clips are denoised before they are decoded, as in the reference; with `renew` that begins after the first.
        """
        clips = range(self._inputs.clips)
        if self._renew:
            first = self._clip(0)
            yield self._decode(first, 0)
            if len(clips) > 1:
                self._stream.show(first[:, :1], self._memory.motion[:, -MOTION_LATENTS:])
            clips = clips[1:]
        for clip, latents in [(clip, self._clip(clip).cpu()) for clip in clips]:
            yield self._decode(latents, clip)

    def close(self) -> None:
        """Leave what only this video would have read."""
        self._stream.close()

    def _clip(self, clip: int) -> Tensor:
        """Latents of a clip, [channels, ring_frames, latent_height, latent_width]."""
        made = []
        for index in range(clip * self._blocks, (clip + 1) * self._blocks):
            states = self._features.block(index)
            assert states is not None
            pose = None if self._pose is None else self._pose.block(index)
            latents = self._stream.next_block(self._noise.block(index), states, pose)
            if self._observe is not None:
                self._observe(index, latents)
            made.append(latents)
        return torch.cat(made, dim=1)

    def _decode(self, latents: Tensor, clip: int) -> Tensor:
        """Frames of a clip, the first one's without the portrait; they enter the memory if another clip follows."""
        frames = self._maker.decode(self._memory.motion, latents.to(self._maker.engine.device))
        frames = frames if clip else frames[:, PORTRAIT_FRAMES:]
        if clip + 1 < self._inputs.clips:
            self._memory.take(frames)
        return frames

    @property
    def _blocks(self) -> int:
        return self._inputs.geometry.blocks_per_clip
