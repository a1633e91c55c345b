"""Norm and SiLU in Triton: a program takes a tile of positions, part by part of their channels.

96, 192 and 384 channels are three parts of a power of two: no lane computes for nothing. What a program reads for the
norm it reads again for the result, from L1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..aot import KernelSpec, kernel_spec
from ..model_sizes import ModelSizes
from .cases import model_cases
from .reference import NORM_EPS

_LEAST_WIDTH = 32
"""Channels of a part; those that do not divide into such parts are one part, filled up."""
_MOST_PARTS = 8
_TILE = 2048
_WARPS = 4


@triton.jit
def normalise_positions(
    x_ptr,
    gamma_ptr,
    out_ptr,
    positions,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST_SQUARE: tl.constexpr,
):
    """ROWS positions."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, WIDTH)
    offsets = row.to(tl.int64)[:, None] * CHANNELS + lane[None, :]
    inside = (row < positions)[:, None]

    square = tl.zeros((ROWS, WIDTH), tl.float32)
    for part in tl.static_range(PARTS):
        mask = inside & (part * WIDTH + lane < CHANNELS)[None, :]
        x = tl.load(x_ptr + part * WIDTH + offsets, mask=mask, other=0.0).to(tl.float32)
        square += x * x
    factor = tl.math.rsqrt(tl.maximum(tl.sum(square, axis=1) / CHANNELS, LEAST_SQUARE))

    for part in tl.static_range(PARTS):
        channel = part * WIDTH + lane
        mask = inside & (channel < CHANNELS)[None, :]
        x = tl.load(x_ptr + part * WIDTH + offsets, mask=mask, other=0.0).to(tl.float32)
        gamma = tl.load(gamma_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        normed = x * factor[:, None] * gamma[None, :]
        out = normed / (1.0 + tl.exp(-normed))
        tl.store(out_ptr + part * WIDTH + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """As the op."""
    channels = x.shape[-1]
    positions = x.numel() // channels
    out = x.new_empty(x.shape)
    constexprs = _tiling(channels)
    normalise_positions[(triton.cdiv(positions, constexprs["ROWS"]),)](
        x, gamma, out, positions, **constexprs, num_warps=_WARPS
    )
    return out


def _tiling(channels: int) -> dict[str, int | float]:
    width = channels & -channels
    if width < _LEAST_WIDTH or channels // width > _MOST_PARTS:
        width = triton.next_power_of_2(channels)
    return {
        "CHANNELS": channels,
        "ROWS": max(1, _TILE // width),
        "WIDTH": width,
        "PARTS": triton.cdiv(channels, width),
        "LEAST_SQUARE": NORM_EPS**2 / channels,
    }


def aot_specs(sizes: ModelSizes, capability: int) -> list[KernelSpec]:
    """The kernels of the decoder on sm_`capability`."""
    return [
        kernel_spec(
            f"rms_norm_silu {channels} channels",
            normalise_positions,
            "bf16",
            _tiling(channels),
            {"num_warps": _WARPS},
            {"gamma_ptr": "*fp32"},
        )
        for channels in sorted({case.channels for case in model_cases(sizes)})
    ]
