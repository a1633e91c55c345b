"""Every number derived from a network and a picture size: tokens, ring capacity, the sink's layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import ConfigError
from .model import ModelConfig

LATENT_STRIDE = 8
"""Pixels per latent, in height and width (Wan 2.1 VAE)."""
LATENT_FRAME_STRIDE = 4
"""Video frames per latent frame (Wan 2.1 VAE)."""
FRAMES_PER_SECOND = 25
SPEECH_RATE = 16_000
"""Samples per second of the speech that the model listens to, mono."""
REFERENCE_TIME = 30
"""Temporal position at which the reference image is prefilled."""


@dataclass(frozen=True)
class MotionBucket:
    """Motion latents packed together: how many, and the (time, row, column) stride in latents of one token."""

    latents: int
    stride: tuple[int, int, int]


MOTION_BUCKETS = (
    MotionBucket(latents=1, stride=(1, 2, 2)),
    MotionBucket(latents=2, stride=(2, 4, 4)),
    MotionBucket(latents=16, stride=(4, 8, 8)),
)
"""From the newest latent to the oldest ones, as in the reference's frame packer."""
MOTION_LATENTS = sum(bucket.latents for bucket in MOTION_BUCKETS)


@dataclass(frozen=True)
class SinkSegment:
    """Tokens of the sink on one grid, with the temporal and spatial positions of its cells."""

    name: str
    times: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.times) * len(self.rows) * len(self.columns)


@dataclass(frozen=True)
class StreamGeometry:
    """Token and latent counts of a stream of `height` x `width` pixels.

    A block is `frames_per_block` latent frames; the ring of a timestep holds `ring_frames` of them, which is also the
    length of a clip (the span of one noise draw).

    Raises:
        ConfigError: the sides are no multiples of 16, or the ring does not hold whole blocks.
    """

    model: ModelConfig
    height: int
    width: int
    frames_per_block: int = 3
    ring_frames: int = 12
    motion_tokens: bool = True

    def __post_init__(self) -> None:
        _, patch_rows, patch_columns = self.model.patch_size
        for name, side, multiple in (
            ("height", self.height, LATENT_STRIDE * patch_rows),
            ("width", self.width, LATENT_STRIDE * patch_columns),
        ):
            if side < multiple or side % multiple:
                raise ConfigError(f"{name} {side}: must be a positive multiple of {multiple} pixels")
        if self.frames_per_block < 1 or self.ring_frames % self.frames_per_block:
            raise ConfigError(
                f"a ring of {self.ring_frames} latent frames does not hold whole blocks of {self.frames_per_block}"
            )
        if self.motion_tokens and min(self.latent_height, self.latent_width) < MOTION_BUCKETS[-1].stride[2]:
            raise ConfigError(
                f"{self.width}x{self.height}: too small to pack motion latents; sides must be at least "
                f"{MOTION_BUCKETS[-1].stride[2] * LATENT_STRIDE} pixels"
            )

    @property
    def latent_height(self) -> int:
        return self.height // LATENT_STRIDE

    @property
    def latent_width(self) -> int:
        return self.width // LATENT_STRIDE

    @property
    def grid_rows(self) -> int:
        return self.latent_height // self.model.patch_size[1]

    @property
    def grid_columns(self) -> int:
        return self.latent_width // self.model.patch_size[2]

    @property
    def tokens_per_frame(self) -> int:
        return self.grid_rows * self.grid_columns

    @property
    def tokens_per_block(self) -> int:
        return self.tokens_per_frame * self.frames_per_block

    @property
    def ring_tokens(self) -> int:
        return self.tokens_per_frame * self.ring_frames

    @property
    def blocks_per_clip(self) -> int:
        return self.ring_frames // self.frames_per_block

    @property
    def columns_per_block(self) -> int:
        """Audio columns, one per video frame, that drive a block."""
        return self.frames_per_block * LATENT_FRAME_STRIDE

    @property
    def seconds_per_block(self) -> float:
        return self.columns_per_block / FRAMES_PER_SECOND

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """Latents of a block: [channels, frames, latent_height, latent_width]."""
        return (self.model.in_dim, self.frames_per_block, self.latent_height, self.latent_width)

    @cached_property
    def fixed_sink(self) -> tuple[SinkSegment, ...]:
        """Packed motion latents, whose positions never move; empty without motion tokens."""
        return self._motion_segments() if self.motion_tokens else ()

    @cached_property
    def reference_segment(self) -> SinkSegment:
        """The reference image, at its prefill position."""
        return SinkSegment(
            "reference", (REFERENCE_TIME,), tuple(range(self.grid_rows)), tuple(range(self.grid_columns))
        )

    @property
    def fixed_sink_tokens(self) -> int:
        return sum(segment.tokens for segment in self.fixed_sink)

    @property
    def sink_tokens(self) -> int:
        return self.fixed_sink_tokens + self.reference_segment.tokens

    def heads_per_rank(self, ranks: int) -> int:
        """Self-attention heads of each of the ranks that share a timestep; each has 1 / ranks of a frame's tokens, too.

        Raises:
            ConfigError: heads or tokens cannot be shared equally.
        """
        heads, tokens = self.model.num_heads, self.tokens_per_frame
        if heads % ranks or tokens % ranks:
            possible = [str(n) for n in range(1, heads + 1) if heads % n == tokens % n == 0]
            raise ConfigError(
                f"sequence_parallel={ranks}: must divide the network's {heads} heads and the {tokens} tokens of a "
                f"latent frame of {self.width}x{self.height}; here it can be {' or '.join(possible)}"
            )
        return heads // ranks

    def _motion_segments(self) -> tuple[SinkSegment, ...]:
        segments: list[SinkSegment] = []
        newest = 0
        for bucket in MOTION_BUCKETS:
            oldest = newest - bucket.latents
            frame_stride, row_stride, column_stride = bucket.stride
            segments.append(
                SinkSegment(
                    f"motion_{len(segments)}",
                    tuple(-t for t in _spread(-oldest, 1 - newest, bucket.latents // frame_stride)),
                    _spread(0, self.grid_rows - 1, self.latent_height // row_stride),
                    _spread(0, self.grid_columns - 1, self.latent_width // column_stride),
                )
            )
            newest = oldest
        return tuple(segments)


def _spread(first: int, last: int, count: int) -> tuple[int, ...]:
    """`count` positions over first..last, truncated to integers: the reference stretches packed grids this way."""
    return tuple(np.linspace(first, last, count).astype(int).tolist())
