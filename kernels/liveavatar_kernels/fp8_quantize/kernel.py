"""Quantisation of rows in Triton: a program per wide row, or for some narrow ones.

Where the largest magnitude of a row is known, programs take parts of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import E4M3_CAPABILITY, KernelSpec, kernel_spec
from ..dispatch import rows_per_program
from ..e4m3 import E4M3
from ..model_sizes import ModelSizes
from ..tiles import quantize_tile, row_scale
from .cases import model_cases

_CHUNK = 1024
"""Columns of a program, which is one warp, when the row's largest magnitude is known."""
_WARP_VALUES = 2048
"""Values of a warp when it is not."""


@triton.jit
def quantize_rows(
    x_ptr,
    row_max_ptr,
    values_ptr,
    scale_ptr,
    x_stride,
    tokens,
    PARTS: tl.constexpr,
    PART_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of ROWS rows; all columns where `row_max_ptr` is None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < tokens if ROWS > 1 else True
    row = row.to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (lane < DIM) & inside
    x = tl.load(x_ptr + row * x_stride + lane, mask=mask, other=0.0).to(tl.float32)
    if row_max_ptr is not None:
        part = tl.arange(0, PART_ROWS)[None, :]
        known = tl.load(row_max_ptr + row * PARTS + part, mask=(part < PARTS) & inside, other=0.0)
        amax = tl.max(known, axis=1, keep_dims=True)
    else:
        amax = tl.max(tl.abs(x), axis=1, keep_dims=True)
    scale = row_scale(amax)
    tl.store(values_ptr + row * DIM + lane, quantize_tile(x, scale), mask=mask)
    tl.store(scale_ptr + row, scale, mask=(tl.program_id(1) == 0) & inside)


def fp8_quantize(x: Tensor, row_max: Tensor | None, *, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """As the op. `rows` are those of a program, a power of two."""
    tokens, dim = x.shape
    values = x.new_empty(x.shape, dtype=E4M3)
    scale = x.new_empty(tokens, dtype=torch.float32)
    parts = 0 if row_max is None else row_max.shape[1]
    constexprs, warps = _tiling(dim, parts, x.device.type, rows)
    grid = (triton.cdiv(tokens, constexprs["ROWS"]), triton.cdiv(dim, constexprs["BLOCK"]))
    quantize_rows[grid](x, row_max, values, scale, x.stride(0), tokens, **constexprs, num_warps=warps)
    return values, scale


def _tiling(dim: int, parts: int, device: str, rows: int | None = None) -> tuple[dict[str, int], int]:
    """Constexprs of the kernel, and its warps."""
    block = triton.next_power_of_2(dim)
    if parts:
        block = min(block, _CHUNK)
    rows = rows or rows_per_program(block, _CHUNK if parts else _WARP_VALUES, device)
    constexprs = {"PARTS": parts, "PART_ROWS": triton.next_power_of_2(parts), "DIM": dim, "ROWS": rows, "BLOCK": block}
    return constexprs, 1 if parts else min(16, max(1, rows * block // _WARP_VALUES))


def aot_specs(sizes: ModelSizes, capability: int) -> list[KernelSpec]:
    """The kernels of a block at `sizes` on sm_`capability`; none where there is no e4m3."""
    if capability < E4M3_CAPABILITY:
        return []
    specs = []
    for case in model_cases(sizes):
        if case.tokens != sizes.block_tokens[0]:
            continue
        constexprs, warps = _tiling(case.dim, case.parts, "cuda")
        specs.append(
            kernel_spec(
                f"fp8_quantize {case.form}",
                quantize_rows,
                "bf16",
                {**constexprs, **({} if case.parts else {"row_max_ptr": None})},
                {"num_warps": warps},
                {"values_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "row_max_ptr": "*fp32"},
            )
        )
    return specs
