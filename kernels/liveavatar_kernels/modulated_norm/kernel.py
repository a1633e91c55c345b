"""Modulated norm in Triton: a program per wide token, or for some narrow ones.

Rows stay in registers from the first read to the last write.

What streams past (x, the branch) is kept out of L1, so that the rows of the modulation, which every token of a group
reads, stay there.
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
from ..tiles import row_scale
from .cases import Case, model_cases

_ROW_WARP_VALUES = 2048
"""Values of a warp where a program takes one row."""
_TILE_VALUES = 2048
_TILE_WARP_VALUES = 512
"""Of a program that takes several rows, and of its warps: every row has addresses of its own, which take registers."""
_VECTOR = 4
"""Neighbouring values that a thread takes: more would pull float32 rows, with 16 bytes a load at most, apart in L1."""
_TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", E4M3: "fp8e4nv"}


@triton.jit
def _streamed(ptr, lane, mask):
    return tl.load(ptr + lane, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def _shared(ptr, lane, mask):
    return tl.load(ptr + lane, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def normalise_tokens(
    x_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    ends_ptr,
    residual_ptr,
    values_ptr,
    values_scale_ptr,
    x_stride,
    branch_stride,
    gate_stride,
    shift_stride,
    scale_stride,
    group_tokens,
    tokens,
    eps,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """ROWS tokens. A pointer is None where the op has no such argument or result; a single group's stride is 0."""
    token = tl.program_id(0)
    lane = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    if ROWS > 1:  # one token stays a plain row: as a tile of one row it takes more registers
        token = token * ROWS + tl.arange(0, ROWS)[:, None]
        lane = lane[None, :]
    row = token.to(tl.int64)
    column = lane < DIM
    inside = token < tokens if ROWS > 1 else True
    mask = column & inside
    x = _streamed(x_ptr + row * x_stride, lane, mask)

    group = token // group_tokens
    if ends_ptr is not None:
        group = token * 0
        for index in tl.static_range(GROUPS - 1):
            group += (token >= tl.load(ends_ptr + index)).to(tl.int32)

    if branch_ptr is not None:
        branch = _streamed(branch_ptr + row * branch_stride, lane, mask)
        if gate_ptr is not None:
            branch *= _shared(gate_ptr + group * gate_stride, lane, mask)
        residual = (x + branch).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * DIM + lane, residual, mask=mask)
        x = residual.to(tl.float32)

    mean = tl.sum(x, axis=-1, keep_dims=ROWS > 1) / DIM
    centred = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=-1, keep_dims=ROWS > 1) / DIM
    values = centred * tl.math.rsqrt(variance + eps)
    if weight_ptr is not None:
        values *= _shared(weight_ptr, lane, column)
    if bias_ptr is not None:
        values += _shared(bias_ptr, lane, column)
    if scale_ptr is not None:
        values *= 1.0 + _shared(scale_ptr + group * scale_stride, lane, mask)
    if shift_ptr is not None:
        values += _shared(shift_ptr + group * shift_stride, lane, mask)

    out = values_ptr + row * DIM + lane
    if values_scale_ptr is not None:
        values_scale = row_scale(tl.max(tl.abs(values), axis=-1, keep_dims=ROWS > 1))
        tl.store(values_scale_ptr + row, values_scale, mask=inside)
        # no quantize_tile: nothing exceeds its own row's scale, and the issue slots of clamping are short here
        quantized = (values * tl.math.div_rn(1.0, values_scale)).to(values_ptr.dtype.element_ty)
        tl.store(out, quantized, mask=mask)
    else:
        tl.store(out, values.to(values_ptr.dtype.element_ty), mask=mask)


def modulated_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    ends: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    *,
    rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the op: residual, values and their scales. `rows` are the tokens of a program, a power of two."""
    tokens, dim = x.shape
    residual = x if branch is None else x.new_empty(x.shape, dtype=residual_dtype)
    values = x.new_empty(x.shape, dtype=dtype)
    values_scale = x.new_empty(tokens, dtype=torch.float32) if dtype == E4M3 else None
    block = triton.next_power_of_2(dim)
    rows = rows or rows_per_program(block, _TILE_VALUES, x.device.type)
    normalise_tokens[(triton.cdiv(tokens, rows),)](
        x,
        branch,
        gate,
        shift,
        scale,
        weight,
        bias,
        ends,
        None if branch is None else residual,
        values,
        values_scale,
        x.stride(0),
        0 if branch is None else branch.stride(0),
        *(0 if each is None or len(each) == 1 else each.stride(0) for each in (gate, shift, scale)),
        max(1, tokens // groups),
        tokens,
        eps,
        GROUPS=groups,
        DIM=dim,
        ROWS=rows,
        BLOCK=block,
        VECTOR=_VECTOR,
        num_warps=_warps(rows, block),
    )
    return residual, values, values_scale


def _warps(rows: int, block: int) -> int:
    return min(16, max(1, rows * block // (_ROW_WARP_VALUES if rows == 1 else _TILE_WARP_VALUES)))


def aot_specs(sizes: ModelSizes, capability: int) -> list[KernelSpec]:
    """The kernels of a block at `sizes` on sm_`capability`."""
    tokens = sizes.block_tokens[0]
    return [
        _spec(case)
        for case in model_cases(sizes)
        if case.tokens == tokens and (capability >= E4M3_CAPABILITY or not case.quantized)
    ]


def _spec(case: Case) -> KernelSpec:
    pointers = {f"{name}_ptr": f"*{_TRITON_NAMES[dtype]}" for name, dtype in case.dtypes(torch.bfloat16).items()}
    absent = {name: None for name in normalise_tokens.arg_names if name.endswith("_ptr") and name not in pointers}
    block = triton.next_power_of_2(case.dim)
    rows = rows_per_program(block, _TILE_VALUES, "cuda")
    constexprs = {"GROUPS": max(case.groups, case.gate_groups), "DIM": case.dim, "ROWS": rows, "BLOCK": block}
    return kernel_spec(
        f"modulated_norm {case.form}",
        normalise_tokens,
        "bf16",
        {**constexprs, "VECTOR": _VECTOR, **absent},
        {"num_warps": _warps(rows, block)},
        pointers,
    )
