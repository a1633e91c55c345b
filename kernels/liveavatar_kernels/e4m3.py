"""Quantisation to float8 e4m3 with one float32 scale per row or tile: value = e4m3 * scale."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-12
"""What is all zeros gets the scale of this largest value, so that scales and their logarithms stay finite."""
KV_TILE = 128
"""Tokens of a key-value tile; e4m3 values of a cache share a scale per tile and head, and blocks start on a tile."""


class Quantized(NamedTuple):
    """Rows in e4m3, each with a scale of its own.

    Attributes:
        values: e4m3 [tokens, dim].
        scale: float32 [tokens].
    """

    values: Tensor
    scale: Tensor


def padded_to_tile(tokens: int) -> int:
    """`tokens` rounded up to whole tiles."""
    return -(-tokens // KV_TILE) * KV_TILE


def scale_of(amax: Tensor) -> Tensor:
    """Scale that maps a largest magnitude to e4m3's: float32 of amax's shape."""
    return amax.float().clamp(min=AMAX_FLOOR) * (1 / E4M3_MAX)


def to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, rounded to nearest even and saturating: e4m3 of x's shape; `scale` broadcasts."""
    return (x.float() * (1 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def quantize_rows(x: Tensor, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise with a scale per row.

    Args:
        x: [..., dim].
        amax: [...], largest magnitudes where they are known.

    Returns:
        e4m3 [..., dim] and its scales, float32 [...].
    """
    scale = scale_of(x.abs().amax(-1) if amax is None else amax)
    return to_e4m3(x, scale[..., None]), scale
