"""Sizes of the model that kernels are tuned, compiled ahead of time and measured for; kernels run at any size."""

from __future__ import annotations

from dataclasses import dataclass

_TIME_DOUBLINGS = 2


@dataclass(frozen=True)
class DecoderLevel:
    """What a block of latents is at one of the VAE decoder's resolutions."""

    channels: int
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class ModelSizes:
    """Sizes that decide the shapes of a layer's ops.

    Attributes:
        block_tokens: tokens of a block at each picture size that is measured.
        ring_blocks: blocks in a ring.
        sink_tokens, moved_tokens: of the sink, by picture size; the moved ones are those of the reference image.
        text_tokens: of a prompt with its padding.
        audio_tokens: of a latent frame.
        pictures: height and width of each picture size that is measured.
        latent_channels: of the VAE.
        decoder_widths: channels of its decoder's levels, from latents to pixels; from one to the next, height and
            width double, and so does the number of frames for as long as it has not doubled twice.
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
    pictures: tuple[tuple[int, int], ...]
    latent_channels: int
    decoder_widths: tuple[int, ...]

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

    def decoder_levels(self, picture: tuple[int, int]) -> tuple[DecoderLevel, ...]:
        """The decoder's levels, from latents to pixels, for a block of a stream that is under way."""
        levels = []
        for level, channels in enumerate(self.decoder_widths):
            height, width = (side >> len(self.decoder_widths) - 1 - level for side in picture)
            levels.append(DecoderLevel(channels, self.block_frames << min(level, _TIME_DOUBLINGS), height, width))
        return tuple(levels)


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
    pictures=((384, 704), (400, 720)),
    latent_channels=16,
    decoder_widths=(384, 384, 192, 96),
)
"""Wan2.2-S2V-14B at 704x384 and 720x400."""
