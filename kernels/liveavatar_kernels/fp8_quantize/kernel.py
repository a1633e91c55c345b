"""Quantisation of rows in Triton: a program per row, or per part of a row whose largest magnitude is known."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import E4M3_CAPABILITY, KernelSpec, kernel_spec
from ..e4m3 import E4M3
from ..model_sizes import ModelSizes
from ..tiles import quantize_tile, row_scale
from .cases import model_cases

_CHUNK = 1024
"""Columns of a program, which is one warp, when the row's largest magnitude is known."""
_WARP_COLUMNS = 2048
"""Columns of a warp when it is not."""


@triton.jit
def quantize_rows(
    x_ptr,
    row_max_ptr,
    values_ptr,
    scale_ptr,
    x_stride,
    PARTS: tl.constexpr,
    PART_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of a row; all of them where `row_max_ptr` is None."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < DIM
    x = tl.load(x_ptr + row * x_stride + lane, mask=mask, other=0.0).to(tl.float32)
    if row_max_ptr is not None:
        part = tl.arange(0, PART_ROWS)
        amax = tl.max(tl.load(row_max_ptr + row * PARTS + part, mask=part < PARTS, other=0.0), axis=0)
    else:
        amax = tl.max(tl.abs(x), axis=0)
    scale = row_scale(amax)
    tl.store(values_ptr + row * DIM + lane, quantize_tile(x, scale), mask=mask)
    tl.store(scale_ptr + row, scale, mask=tl.program_id(1) == 0)


def fp8_quantize(x: Tensor, row_max: Tensor | None) -> tuple[Tensor, Tensor]:
    """As the op."""
    tokens, dim = x.shape
    values = x.new_empty(x.shape, dtype=E4M3)
    scale = x.new_empty(tokens, dtype=torch.float32)
    parts = 0 if row_max is None else row_max.shape[1]
    block, warps = _tiling(dim, parts)
    quantize_rows[(tokens, triton.cdiv(dim, block))](
        x,
        row_max,
        values,
        scale,
        x.stride(0),
        PARTS=parts,
        PART_ROWS=triton.next_power_of_2(parts),
        DIM=dim,
        BLOCK=block,
        num_warps=warps,
    )
    return values, scale


def _tiling(dim: int, parts: int) -> tuple[int, int]:
    """Columns and warps of a program."""
    block = triton.next_power_of_2(dim)
    return (min(block, _CHUNK), 1) if parts else (block, min(16, max(1, block // _WARP_COLUMNS)))


def aot_specs(sizes: ModelSizes, capability: int) -> list[KernelSpec]:
    """The kernels of a block at `sizes` on sm_`capability`; none where there is no e4m3."""
    if capability < E4M3_CAPABILITY:
        return []
    specs = []
    for case in model_cases(sizes):
        if case.tokens != sizes.block_tokens[0]:
            continue
        block, warps = _tiling(case.dim, case.parts)
        constexprs = {"PARTS": case.parts, "PART_ROWS": triton.next_power_of_2(case.parts), "DIM": case.dim}
        specs.append(
            kernel_spec(
                f"fp8_quantize {case.form}",
                quantize_rows,
                "bf16",
                {**constexprs, "BLOCK": block, **({} if case.parts else {"row_max_ptr": None})},
                {"num_warps": warps},
                {"values_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "row_max_ptr": "*fp32"},
            )
        )
    return specs
