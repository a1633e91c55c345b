"""Rotary position embedding on adjacent pairs, shared by the ops that rotate queries or keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """Cosines and sines of a block's tokens, in (frame, position) order.

    A pair of a head takes its angle from the temporal table while there are temporal pairs, then from the spatial one.

    Attributes:
        time: [frames, 2, temporal_pairs], cosines and sines; rewritten from block to block.
        space: [tokens_per_frame, 2, spatial_pairs]; the same for every block.
    """

    time: Tensor
    space: Tensor

    @property
    def tokens(self) -> int:
        return self.time.shape[0] * self.space.shape[0]

    @property
    def pairs(self) -> int:
        """Half of head_dim."""
        return self.time.shape[-1] + self.space.shape[-1]

    def table(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every token, [tokens, head_dim / 2] each."""
        frames, positions = self.time.shape[0], self.space.shape[0]
        both = torch.cat(
            (
                self.time[:, None].expand(-1, positions, -1, -1),
                self.space[None].expand(frames, -1, -1, -1),
            ),
            dim=-1,
        ).flatten(0, 1)
        return both[:, 0], both[:, 1]


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs (2i, 2i+1) of `x` by the angles given as cosines and sines, in float32.

    Args:
        x: [tokens, heads, head_dim], any floating dtype.
        cos, sin: [tokens, pairs] or [1, pairs] with pairs <= head_dim / 2; pairs beyond stay as they are.

    Returns:
        [tokens, heads, head_dim] in x's dtype, or float64 when x is float64.
    """
    pairs = cos.shape[-1]
    wide = x if x.dtype == torch.float64 else x.float()
    even, odd = wide[..., 0 : 2 * pairs : 2], wide[..., 1 : 2 * pairs : 2]
    cos, sin = cos.to(wide.dtype)[:, None], sin.to(wide.dtype)[:, None]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((rotated, wide[..., 2 * pairs :]), dim=-1).to(x.dtype)
