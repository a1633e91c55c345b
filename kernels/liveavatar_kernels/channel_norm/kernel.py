"""Sum, norm and SiLU in Triton: a program takes a tile of positions, part by part of their channels.

96, 192 and 384 channels are three parts of a power of two: no lane computes for nothing. The sum stays in registers
from the first read to the last write, so that results may lie where arguments lay.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..aot import KernelSpec, kernel_spec
from ..model_sizes import ModelSizes
from .cases import Case, model_cases
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
    bias_ptr,
    residual_ptr,
    total_ptr,
    values_ptr,
    positions,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST_SQUARE: tl.constexpr,
    SILU: tl.constexpr,
):
    """ROWS positions. A pointer is None where the op has no such argument or result."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, WIDTH)
    offsets = row.to(tl.int64)[:, None] * CHANNELS + lane[None, :]
    inside = (row < positions)[:, None]

    totals = ()
    square = tl.zeros((ROWS, WIDTH), tl.float32)
    for part in tl.static_range(PARTS):
        channel = part * WIDTH + lane
        mask = inside & (channel < CHANNELS)[None, :]
        x = tl.load(x_ptr + part * WIDTH + offsets, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            x += tl.load(residual_ptr + part * WIDTH + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(x_ptr.dtype.element_ty)
        if total_ptr is not None:
            tl.store(total_ptr + part * WIDTH + offsets, rounded, mask=mask)
        total = rounded.to(tl.float32)
        square += total * total
        totals = totals + (total,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no starred tuples
    factor = tl.math.rsqrt(tl.maximum(tl.sum(square, axis=1) / CHANNELS, LEAST_SQUARE))

    for part in tl.static_range(PARTS):
        channel = part * WIDTH + lane
        mask = inside & (channel < CHANNELS)[None, :]
        gamma = tl.load(gamma_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        out = totals[part] * factor[:, None] * gamma[None, :]
        if SILU:
            out = out / (1.0 + tl.exp(-out))
        tl.store(values_ptr + part * WIDTH + offsets, out.to(values_ptr.dtype.element_ty), mask=mask)


def channel_norm(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    total: Tensor | None,
    values: Tensor,
) -> None:
    """As the op; `total` is written unless it is None."""
    channels = x.shape[-1]
    positions = x.numel() // channels
    constexprs = _tiling(channels)
    normalise_positions[(triton.cdiv(positions, constexprs["ROWS"]),)](
        x, gamma, bias, residual, total, values, positions, **constexprs, SILU=silu, num_warps=_WARPS
    )


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
    cases = {f"channel_norm {case.channels} channels, {case.form}": case for case in model_cases(sizes)}
    return [_spec(name, case) for name, case in cases.items()]


def _spec(name: str, case: Case) -> KernelSpec:
    present = {"bias_ptr": case.bias, "residual_ptr": case.residual, "total_ptr": case.total}
    absent = {pointer: None for pointer, there in present.items() if not there}
    types = {pointer: "*fp32" for pointer in ("gamma_ptr", "bias_ptr") if pointer not in absent}
    constexprs = {**_tiling(case.channels), "SILU": case.silu, **absent}
    return kernel_spec(name, normalise_positions, "bf16", constexprs, {"num_warps": _WARPS}, types)
