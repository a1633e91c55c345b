"""Sizes of the model that kernels are tuned, compiled ahead of time and measured for; kernels run at any size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSizes:
    """Sizes that decide the shapes of a layer's ops.

    Attributes:
        block_tokens: tokens of a block at each picture size that is measured.
        ring_blocks: blocks in a ring.
        sink_tokens, moved_tokens: of the sink, by picture size; the moved ones are those of the reference image.
        text_tokens: of a prompt with its padding.
        audio_tokens: of a latent frame.
    """

    dim: int
    heads: int
    ffn_dim: int
    block_frames: int
    ring_blocks: int
    block_tokens: tuple[int, ...]
    sink_tokens: tuple[int, ...]
    text_tokens: int
    audio_tokens: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def space_pairs(self) -> int:
        """Rotated pairs of a head that follow the row or the column."""
        return 2 * (self.head_dim // 6)

    @property
    def time_pairs(self) -> int:
        """Rotated pairs of a head that follow time."""
        return self.head_dim // 2 - self.space_pairs


WAN_14B = ModelSizes(
    dim=5120,
    heads=40,
    ffn_dim=13824,
    block_frames=3,
    ring_blocks=4,
    block_tokens=(3168, 3375),
    sink_tokens=(2640, 2812),
    text_tokens=512,
    audio_tokens=5,
)
"""Wan2.2-S2V-14B at 704x384 and 720x400."""
