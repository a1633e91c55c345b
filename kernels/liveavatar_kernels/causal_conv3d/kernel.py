"""The convolution in Triton: an implicit GEMM of pixels by output channels, summed over taps and input channels.

A program computes some pixels of one frame, row by row of the picture, with the programs of the frames beside it next
to it, which read much of the same. A tap is the same tile of pixels somewhere else: its address moves, and pixels
outside the picture are masked. Taps of a row of the kernel follow each other, so that what one reads the next finds
in L1. 96 and 192 output channels are two tiles, of 64 and 32 or of 128 and 64: no lane computes for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import KernelSpec, kernel_spec
from ..dispatch import capability_of
from ..model_sizes import ModelSizes
from .cases import Case, model_cases
from .tiling import Tiling

_ROUNDING = tl.constexpr(1.5 * 2**23)
"""Added to a small float32 and taken off again, it leaves the nearest integer, the even one of two."""


@triton.jit
def _finish(
    total,
    bias_ptr,
    residual_ptr,
    out_ptr,
    pixel,
    pixels,
    first_column,
    CHANNELS_OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Bias and residual in float32, and the store; pointers are those of the frame."""
    column = first_column + tl.arange(0, COLUMNS)
    inside = (pixel < pixels)[:, None] & (column < CHANNELS_OUT)[None, :]
    offsets = pixel[:, None] * CHANNELS_OUT + column[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < CHANNELS_OUT, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if BYTES:
        total = (tl.minimum(tl.maximum(total, -1.0), 1.0) + 1.0) * 127.5
        total = (total + _ROUNDING) - _ROUNDING
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def convolve(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    frames,
    height,
    width,
    CHANNELS_IN: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MORE_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """ROWS pixels of a frame by COLUMNS + MORE_COLUMNS channels; frames, height and width are the result's."""
    TAPS: tl.constexpr = KT * KH * KW
    CHUNKS: tl.constexpr = (CHANNELS_IN + DEPTH - 1) // DEPTH
    PIXEL: tl.constexpr = CHANNELS_IN * (1 + INTERLEAVED)
    COLUMN_TILES: tl.constexpr = (CHANNELS_OUT + COLUMNS + MORE_COLUMNS - 1) // (COLUMNS + MORE_COLUMNS)
    program = tl.program_id(0)
    first_column = program % COLUMN_TILES * (COLUMNS + MORE_COLUMNS)
    frame = program // COLUMN_TILES % frames
    pixels = height * width
    pixel = program // COLUMN_TILES // frames * ROWS + tl.arange(0, ROWS)
    row = pixel // width
    column = pixel % width

    read_width = width // 2 if UPSAMPLE else width
    read_pixels = pixels // 4 if UPSAMPLE else pixels
    if INTERLEAVED:
        x_ptr += (frame // 2).to(tl.int64) * read_pixels * PIXEL + frame % 2 * CHANNELS_IN
    else:
        x_ptr += frame.to(tl.int64) * read_pixels * PIXEL

    inside = tl.zeros((ROWS,), tl.int32)  # a bit for each tap of a frame
    for down in tl.static_range(KH):
        for right in tl.static_range(KW):
            h = row + (down - KH // 2)
            w = column + (right - KW // 2)
            there = (pixel < pixels) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            inside |= there.to(tl.int32) << (down * KW + right)

    lane = tl.arange(0, DEPTH)
    x_offsets = pixel * PIXEL
    weight_row = first_column + tl.arange(0, COLUMNS)
    weight_offsets = weight_row[None, :] * (TAPS * CHANNELS_IN) + lane[:, None]
    if MORE_COLUMNS:
        more_row = first_column + COLUMNS + tl.arange(0, MORE_COLUMNS)
        more_offsets = more_row[None, :] * (TAPS * CHANNELS_IN) + lane[:, None]
        more_total = tl.zeros((ROWS, MORE_COLUMNS), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)

    for step in tl.range(TAPS * CHUNKS):
        dw = step % KW
        chunk = step // KW % CHUNKS
        dh = step // (KW * CHUNKS) % KH
        dt = step // (KW * CHUNKS * KH)
        channel = chunk * DEPTH + lane
        mask = ((inside >> (dh * KW + dw)) & 1).to(tl.int1)[:, None]
        weight_mask = (weight_row < CHANNELS_OUT)[None, :]
        if CHANNELS_IN % DEPTH:
            mask &= (channel < CHANNELS_IN)[None, :]
            weight_mask &= (channel < CHANNELS_IN)[:, None]
        if UPSAMPLE:
            h = (row + (dh - KH // 2)) >> 1
            w = (column + (dw - KW // 2)) >> 1
            from_ptr = x_ptr + chunk * DEPTH
            x_offsets = (h * read_width + w) * PIXEL
        else:
            from_ptr = x_ptr + dt.to(tl.int64) * read_pixels * PIXEL
            from_ptr += ((dh - KH // 2) * width + (dw - KW // 2)) * PIXEL + chunk * DEPTH
        tile = tl.load(from_ptr + x_offsets[:, None] + lane[None, :], mask=mask, other=0.0, cache_modifier=".ca")
        taps_ptr = weight_ptr + ((dt * KH + dh) * KW + dw) * CHANNELS_IN + chunk * DEPTH
        weight = tl.load(taps_ptr + weight_offsets, mask=weight_mask, other=0.0)
        total = tl.dot(tile, weight, total, input_precision="ieee")
        if MORE_COLUMNS:
            weight = tl.load(taps_ptr + more_offsets)
            more_total = tl.dot(tile, weight, more_total, input_precision="ieee")

    out_ptr += frame.to(tl.int64) * pixels * CHANNELS_OUT
    if residual_ptr is not None:
        residual_ptr += frame.to(tl.int64) * pixels * CHANNELS_OUT
    _finish(
        total, bias_ptr, residual_ptr, out_ptr, pixel, pixels, first_column, CHANNELS_OUT, COLUMNS, BYTES
    )  # fmt: skip
    if MORE_COLUMNS:
        _finish(
            more_total, bias_ptr, residual_ptr, out_ptr, pixel, pixels, first_column + COLUMNS,
            CHANNELS_OUT, MORE_COLUMNS, BYTES,
        )  # fmt: skip


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
    interleaved: bool,
    out: Tensor | None,
) -> Tensor:
    """As the op; a new tensor unless `out` is given."""
    if out is None:
        frames, height, width, _ = x.shape
        times = 1 + upsample
        frames = (frames - weight.shape[1] + 1) * (1 + interleaved)
        out = x.new_empty(frames, height * times, width * times, weight.shape[0])
    _launch(x, weight, bias, residual, upsample, interleaved, out)
    return out


def causal_conv3d_pixels(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """As the op."""
    _launch(x, weight, bias, None, False, False, out)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
    interleaved: bool,
    out: Tensor,
) -> None:
    frames, height, width, channels_out = out.shape
    tiling = Tiling.of(capability_of(x.device), weight.shape[-1], channels_out, x.element_size())
    programs = triton.cdiv(height * width, tiling.rows) * frames * triton.cdiv(channels_out, tiling.all_columns)
    convolve[(programs,)](
        x,
        weight,
        bias,
        residual,
        out,
        frames,
        height,
        width,
        **_constexprs(tiling, tuple(weight.shape), upsample, interleaved, out.dtype == torch.uint8),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


def _constexprs(
    tiling: Tiling, weight: tuple[int, ...], upsample: bool, interleaved: bool, to_bytes: bool
) -> dict[str, int | bool]:
    channels_out, kt, kh, kw, channels_in = weight
    return {
        "CHANNELS_IN": channels_in,
        "CHANNELS_OUT": channels_out,
        "KT": kt,
        "KH": kh,
        "KW": kw,
        "UPSAMPLE": upsample,
        "INTERLEAVED": interleaved,
        "BYTES": to_bytes,
        "ROWS": tiling.rows,
        "COLUMNS": tiling.columns,
        "MORE_COLUMNS": tiling.more_columns,
        "DEPTH": tiling.depth,
    }


def aot_specs(sizes: ModelSizes, capability: int) -> list[KernelSpec]:
    """The kernels of the decoder on sm_`capability`, each once: its name is that of the first case that needs it."""
    specs: dict[tuple[tuple[str, Any], ...], KernelSpec] = {}
    for case in model_cases(sizes):
        spec = _spec(case, capability)
        specs.setdefault(tuple(spec.constexprs.items()), spec)
    return list(specs.values())


def _spec(case: Case, capability: int) -> KernelSpec:
    tiling = Tiling.of(capability, case.channels_in, case.channels_out)
    constexprs = _constexprs(tiling, case.weight_shape, case.upsample, case.interleaved, case.pixels)
    present = {"bias_ptr": case.bias, "residual_ptr": case.residual}
    absent = {pointer: None for pointer, there in present.items() if not there}
    types = {"bias_ptr": "*fp32"} if case.bias else {}
    if case.pixels:
        types["out_ptr"] = "*u8"
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    return kernel_spec(
        f"causal_conv3d {case.form}", convolve, "bf16", {**constexprs, **absent}, options, types, matrix=True
    )
