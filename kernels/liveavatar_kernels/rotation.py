"""Rotary position embedding on adjacent pairs, shared by the ops that rotate queries or keys."""

import torch
from torch import Tensor


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
