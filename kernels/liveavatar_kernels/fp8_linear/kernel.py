"""The FP8 linear layer in Triton: persistent programs that load and store by TMA, and a plain kernel for the rest."""

from __future__ import annotations

from dataclasses import replace
from math import e, log2, pi, sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..aot import E4M3_CAPABILITY, KernelSpec, kernel_spec
from ..dispatch import capability_of, processors_of
from ..model_sizes import ModelSizes
from .cases import model_cases
from .tiling import HOPPER_PROCESSORS, ROW_MAX_COLUMNS, Tiling, suits_tma

_ROW_MAX_COLUMNS = tl.constexpr(ROW_MAX_COLUMNS)
_GELU_LINEAR = tl.constexpr(-2 * sqrt(2 / pi) * log2(e))
_GELU_CUBIC = tl.constexpr(-2 * sqrt(2 / pi) * log2(e) * 0.044715)


@triton.jit
def _gelu(x):
    """GELU(tanh): (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which does not cancel where u is negative."""
    return x / (1.0 + tl.exp2(x * (_GELU_LINEAR + _GELU_CUBIC * x * x)))


@triton.jit
def _place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile: bands of GROUP rows, down the columns of a band, so that nearby tiles share loads."""
    band = tile // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - band * GROUP, GROUP)
    inside = tile - band * GROUP * column_tiles
    return band * GROUP + inside % height, inside // height


@triton.jit
def _finish(
    total,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    first_row,
    first_column,
    tokens,
    out_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
):
    """Scales, bias and GELU in float32. Columns outside come out as zeros."""
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    y = total * tl.load(x_scale_ptr + row, mask=row < tokens, other=0.0)[:, None]
    y *= tl.load(weight_scale_ptr + column, mask=column < out_features, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < out_features, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = _gelu(y)
    return y


@triton.jit
def _largest(y):
    """Largest magnitude of every row, as it was rounded."""
    return tl.max(tl.abs(y.to(tl.float32)), 1)


@triton.jit
def _store_largest(largest, row_max_ptr, first_row, first_column, tokens, out_features, ROWS: tl.constexpr):
    row = first_row + tl.arange(0, ROWS)
    tiles = tl.cdiv(out_features, _ROW_MAX_COLUMNS)
    inside = row < tl.where(first_column < out_features, tokens, 0)
    tl.store(row_max_ptr + row * tiles + first_column // _ROW_MAX_COLUMNS, largest, mask=inside)


@triton.jit
def linear_persistent(
    x,
    weight,
    out,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    row_max_ptr,
    tokens,
    in_features,
    out_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISE: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    ROW_MAX: tl.constexpr,
):
    """Every program computes each of its tiles in turn; x, weight and out are tensor descriptors.

    A tile is finished in two halves, which keeps a 128x256 tile in registers. Rows and columns outside are loaded as
    zeros and not stored.
    """
    HALF: tl.constexpr = COLUMNS // 2
    row_tiles = tl.cdiv(tokens, ROWS)
    column_tiles = tl.cdiv(out_features, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        row = row_tile * ROWS
        left = column_tile * COLUMNS
        right = left + HALF
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in tl.range(0, in_features, DEPTH):
            x_tile = x.load([row, depth])
            weight_tile = weight.load([left, depth])
            total = tl.dot(x_tile, weight_tile.T, total, max_num_imprecise_acc=DEPTH if PRECISE else None)
        left_total, right_total = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, HALF)), (0, 2, 1)))
        y = _finish(
            left_total, x_scale_ptr, weight_scale_ptr, bias_ptr, row, left, tokens, out_features,
            ROWS, HALF, BIAS, GELU,
        ).to(out.dtype)  # fmt: skip
        out.store([row, left], y)
        if ROW_MAX:
            largest = _largest(y)
        y = _finish(
            right_total, x_scale_ptr, weight_scale_ptr, bias_ptr, row, right, tokens, out_features,
            ROWS, HALF, BIAS, GELU,
        ).to(out.dtype)  # fmt: skip
        out.store([row, right], y)
        if ROW_MAX:
            if HALF < _ROW_MAX_COLUMNS:
                largest = tl.maximum(largest, _largest(y))
            else:
                _store_largest(_largest(y), row_max_ptr, row, right, tokens, out_features, ROWS)
            _store_largest(largest, row_max_ptr, row, left, tokens, out_features, ROWS)


@triton.jit
def linear_plain(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    row_max_ptr,
    tokens,
    in_features,
    out_features,
    x_stride,
    weight_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISE: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    ROW_MAX: tl.constexpr,
):
    """A program per tile. Rows and columns outside repeat the last one and are not stored."""
    row_tile, column_tile = _place(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.cdiv(out_features, COLUMNS), GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, DEPTH)
    x_rows = x_ptr + tl.minimum(row, tokens - 1).to(tl.int64)[:, None] * x_stride + lane[None, :]
    weight_rows = (
        weight_ptr + tl.minimum(column, out_features - 1).to(tl.int64)[None, :] * weight_stride + lane[:, None]
    )
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for depth in tl.range(0, in_features, DEPTH):
        inside = lane < in_features - depth
        x_tile = tl.load(x_rows + depth, mask=inside[None, :], other=0.0)
        weight_tile = tl.load(weight_rows + depth, mask=inside[:, None], other=0.0)
        total = tl.dot(x_tile, weight_tile, total, max_num_imprecise_acc=DEPTH if PRECISE else None)
    y = _finish(
        total, x_scale_ptr, weight_scale_ptr, bias_ptr, row_tile * ROWS, column_tile * COLUMNS, tokens, out_features,
        ROWS, COLUMNS, BIAS, GELU,
    ).to(out_ptr.dtype.element_ty)  # fmt: skip
    inside = (row < tokens)[:, None] & (column < out_features)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * out_features + column[None, :], y, mask=inside)
    if ROW_MAX:
        _store_largest(_largest(y), row_max_ptr, row_tile * ROWS, column_tile * COLUMNS, tokens, out_features, ROWS)


def fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    row_max: bool,
    *,
    tiling: Tiling | None = None,
    processors: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As the custom op. `processors` are those that persistent programs share; None: the device's."""
    (tokens, in_features), out_features = x.shape, weight.shape[0]
    processors = processors or processors_of(x.device)
    tiling = tiling or Tiling.of(
        capability_of(x.device),
        processors,
        tokens,
        in_features,
        out_features,
        dtype.itemsize,
        suits_tma(x, weight, dtype) and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0,
    )
    out = x.new_empty((tokens, out_features), dtype=dtype)
    maxima = x.new_empty((tokens, triton.cdiv(out_features, ROW_MAX_COLUMNS) if row_max else 0), dtype=torch.float32)
    tiles = triton.cdiv(tokens, tiling.rows) * triton.cdiv(out_features, tiling.columns)
    if tiles == 0:
        return out, maxima
    scales = (x_scale, weight_scale, weight_scale if bias is None else bias)
    sizes = (tokens, in_features, out_features)
    options = _constexprs(tiling, bias is not None, gelu, row_max) | _options(tiling)
    if tiling.tma:
        descriptors = (
            TensorDescriptor(x, [tokens, in_features], list(x.stride()), [tiling.rows, tiling.depth]),
            TensorDescriptor(
                weight, [out_features, in_features], list(weight.stride()), [tiling.columns, tiling.depth]
            ),
            TensorDescriptor(out, [tokens, out_features], list(out.stride()), [tiling.rows, tiling.columns // 2]),
        )
        linear_persistent[(min(processors, tiles),)](*descriptors, *scales, maxima, *sizes, **options)
    else:
        strides = (x.stride(0), weight.stride(0))
        linear_plain[(tiles,)](x, weight, out, *scales, maxima, *sizes, *strides, **options)
    return out, maxima


def _constexprs(tiling: Tiling, bias: bool, gelu: bool, row_max: bool) -> dict[str, int | bool]:
    return {
        "ROWS": tiling.rows,
        "COLUMNS": tiling.columns,
        "DEPTH": tiling.depth,
        "GROUP": tiling.group,
        "PRECISE": tiling.precise,
        "BIAS": bias,
        "GELU": gelu,
        "ROW_MAX": row_max,
    }


def _options(tiling: Tiling) -> dict[str, int]:
    return {"num_warps": tiling.warps, "num_stages": tiling.stages}


def aot_specs(sizes: ModelSizes, capability: int) -> list[KernelSpec]:
    """The products of a layer at `sizes` on sm_`capability`, by the plain kernel too: it takes what TMA cannot."""
    if capability < E4M3_CAPABILITY:
        return []
    specs = {}
    for case in model_cases(sizes):
        for tma in (True, False):
            tiling = Tiling.of(capability, HOPPER_PROCESSORS, case.tokens, case.in_features, case.out_features, tma=tma)
            spec = _spec(tiling, case.gelu, case.quantized)
            specs[spec.name] = spec
    return list(specs.values())


def _spec(tiling: Tiling, gelu: bool, row_max: bool) -> KernelSpec:
    parts = ["fp8_linear", "persistent" if tiling.tma else "plain", f"{tiling.rows}x{tiling.columns}"]
    parts += [word for word, used in (("precise", tiling.precise), ("gelu", gelu), ("row max", row_max)) if used]
    scales = {"x_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32", "row_max_ptr": "*fp32"}
    if tiling.tma:
        types = {
            "x": f"tensordesc<fp8e4nv[{tiling.rows}, {tiling.depth}]>",
            "weight": f"tensordesc<fp8e4nv[{tiling.columns}, {tiling.depth}]>",
            "out": f"tensordesc<bf16[{tiling.rows}, {tiling.columns // 2}]>",
        }
    else:
        types = {"x_ptr": "*fp8e4nv", "weight_ptr": "*fp8e4nv"}
    spec = kernel_spec(
        " ".join(parts),
        linear_persistent if tiling.tma else linear_plain,
        "bf16",
        _constexprs(tiling, True, gelu, row_max),
        _options(tiling),
        scales | types,
        matrix=True,
    )
    return replace(spec, divisible_by_16=(*spec.divisible_by_16, "in_features", "out_features"))
