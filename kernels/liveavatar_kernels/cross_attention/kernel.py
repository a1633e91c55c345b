"""Cross attention in Triton: one kernel finds the queries' norms, another attends a tile of queries of one head.

A norm spans all heads and a program of the second kernel sees one: hence the first, which writes one number a query.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import KernelSpec, kernel_spec
from ..dispatch import capability_of, rows_per_program
from ..model_sizes import ModelSizes
from ..ring_attention.device import NOTHING_YET, take_tiles
from ..ring_attention.emulation import LOG2_E
from ..ring_attention.tiling import Tiling

_FEW_ROWS = 16
"""Rows of a slot up to which all keys are one small tile."""
_TILE_VALUES = 2048
"""That a program of the first kernel takes at a time."""
_NORM_WARPS = 4
_ONE_RUN = tl.constexpr(1 << 30)
"""Length of a run that no slot exceeds."""
_POINTERS = {"factor_ptr": "*fp32", "view_ptr": "*i32"}


@triton.jit
def find_norms(
    q_ptr,
    factor_ptr,
    q_group_stride,
    q_token_stride,
    tokens,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """1 / sqrt(mean square + eps) of ROWS queries of a group, over PARTS x WIDTH values each."""
    group = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = token < tokens
    rows = q_ptr + group * q_group_stride + token.to(tl.int64)[:, None] * q_token_stride
    square = tl.zeros((ROWS, WIDTH), tl.float32)
    for part in tl.static_range(PARTS):
        lanes = part * WIDTH + tl.arange(0, WIDTH)
        q = tl.load(rows + lanes[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        square += q * q
    factor = tl.math.rsqrt(tl.sum(square, axis=1) / (PARTS * WIDTH) + eps)
    tl.store(factor_ptr + group * tokens + token, factor, mask=inside)


@triton.jit
def attend_to_slot(
    q_ptr,
    factor_ptr,
    weight_ptr,
    k_ptr,
    v_ptr,
    view_ptr,
    out_ptr,
    tokens,
    scale,
    q_group_stride,
    q_token_stride,
    k_slot_stride,
    k_row_stride,
    v_slot_stride,
    v_row_stride,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries of one head of one group.

    The online softmax starts from the padding's key, its count in the exponent, and goes on with the keys before it.
    """
    head, heads = tl.program_id(0), tl.num_programs(0)
    first = tl.program_id(1) * QUERIES
    group = tl.program_id(2).to(tl.int64)
    row, lane = tl.arange(0, QUERIES), tl.arange(0, HEAD_DIM)
    inside = first + row < tokens

    slot = tl.load(view_ptr + group * 3).to(tl.int64)
    seen = tl.load(view_ptr + group * 3 + 1)
    count = tl.load(view_ptr + group * 3 + 2)
    k_ptr += slot * k_slot_stride + head * HEAD_DIM
    v_ptr += slot * v_slot_stride + head * HEAD_DIM
    padded = count > 0
    lanes = lane < tl.where(padded, HEAD_DIM, 0)
    padding_k = tl.load(k_ptr + seen * k_row_stride + lane, mask=lanes, other=0.0).to(tl.float32)
    padding_v = tl.load(v_ptr + seen * v_row_stride + lane, mask=lanes, other=0.0).to(tl.float32)

    q_rows = q_ptr + group * q_group_stride + first.to(tl.int64) * q_token_stride + head * HEAD_DIM
    q = tl.load(q_rows + row[:, None] * q_token_stride + lane[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + group * tokens + first + row, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + head * HEAD_DIM + lane).to(tl.float32)
    q = (q * factor[:, None] * weight[None, :]).to(q_ptr.dtype.element_ty)

    exponent = tl.sum(q.to(tl.float32) * padding_k[None, :], 1) * scale
    maximum = tl.where(padded, exponent + tl.log2(tl.maximum(count, 1).to(tl.float32)), NOTHING_YET)
    total = tl.zeros((QUERIES,), tl.float32) + tl.where(padded, 1.0, 0.0)
    values = tl.zeros((QUERIES, HEAD_DIM), tl.float32) + padding_v[None, :]

    whole = 0
    if KEYS > TAIL:
        whole = seen // KEYS
        values, total, maximum = take_tiles(
            q, scale, values, total, maximum, k_ptr, v_ptr, None, None, None, None, 0, head,
            k_row_stride, v_row_stride, 0, 0, whole, 0, seen, _ONE_RUN, _ONE_RUN,
            HEAD_DIM, KEYS, False, False, False, PRECISION,
        )  # fmt: skip
    rest = whole * KEYS
    values, total, maximum = take_tiles(
        q, scale, values, total, maximum, k_ptr, v_ptr, None, None, None, None, 0, head,
        k_row_stride, v_row_stride, rest, 0, tl.cdiv(seen - rest, TAIL), 0, seen, _ONE_RUN, _ONE_RUN,
        HEAD_DIM, TAIL, True, False, False, PRECISION,
    )  # fmt: skip

    out = (values / total[:, None]).to(out_ptr.dtype.element_ty)
    out_rows = out_ptr + ((group * tokens + first) * heads + head) * HEAD_DIM
    tl.store(out_rows + row[:, None] * (heads * HEAD_DIM) + lane[None, :], out, mask=inside[:, None])


def cross_attention(
    q: Tensor,
    norm_weight: Tensor,
    k: Tensor,
    v: Tensor,
    view: Tensor,
    eps: float,
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """As the op. `tiling` follows from the device and the rows of a slot if None."""
    groups, tokens, heads, head_dim = q.shape
    tiling = tiling or _tiling(capability_of(q.device), q.itemsize, k.shape[1])
    out = q.new_empty(q.shape)
    factors = q.new_empty((groups, tokens), dtype=torch.float32)
    constexprs = _norm_tiling(heads * head_dim, q.device.type)
    find_norms[(triton.cdiv(tokens, constexprs["ROWS"]), groups)](
        q, factors, *q.stride()[:2], tokens, eps, **constexprs, num_warps=_NORM_WARPS
    )
    attend_to_slot[(heads, triton.cdiv(tokens, tiling.queries), groups)](
        q,
        factors,
        norm_weight,
        k,
        v,
        view,
        out,
        tokens,
        head_dim**-0.5 * LOG2_E,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        HEAD_DIM=head_dim,
        QUERIES=tiling.queries,
        KEYS=tiling.keys,
        TAIL=tiling.tail,
        PRECISION="ieee",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out


def _tiling(capability: int, itemsize: int, rows: int) -> Tiling:
    """For sm_`capability` (0: the interpreter), elements of `itemsize` bytes and `rows` keys at most.

    Keys are few and little is computed: tiles are small enough for two programs on a processor, one of which computes
    while the other one loads.
    """
    if capability == 0:
        tiling = Tiling(32, 64, 4, 1)
    else:
        tiling = Tiling(16, 32, 8, 2) if itemsize == 4 else Tiling(64, 64, 4, 2)
    return replace(tiling, keys=_FEW_ROWS) if rows <= _FEW_ROWS else tiling


def _norm_tiling(dim: int, device: str) -> dict[str, int]:
    """Constexprs of `find_norms`: parts are a power of two wide, so that no lane computes for nothing."""
    width = dim & -dim
    return {"ROWS": rows_per_program(width, _TILE_VALUES, device), "WIDTH": width, "PARTS": dim // width}


def aot_specs(sizes: ModelSizes, capability: int) -> list[KernelSpec]:
    """The kernels of a block at `sizes` on sm_`capability`."""
    specs = [
        kernel_spec(
            "cross_attention norms",
            find_norms,
            "bf16",
            _norm_tiling(sizes.dim, "cuda"),
            {"num_warps": _NORM_WARPS},
            _POINTERS,
        )
    ]
    for name, rows in (("text", sizes.text_tokens), ("audio", sizes.audio_tokens)):
        tiling = _tiling(capability, 2, rows)
        specs.append(
            kernel_spec(
                f"cross_attention {name} {tiling.queries}x{tiling.keys}",
                attend_to_slot,
                "bf16",
                {
                    "HEAD_DIM": sizes.head_dim,
                    "QUERIES": tiling.queries,
                    "KEYS": tiling.keys,
                    "TAIL": tiling.tail,
                    "PRECISION": "ieee",
                },
                {"num_warps": tiling.warps, "num_stages": tiling.stages},
                _POINTERS,
                matrix=True,
            )
        )
    return specs
