"""Ring attention in Triton, what runs on the GPU: a program attends a tile of queries of one head to what it sees."""

from __future__ import annotations

import triton
import triton.language as tl

from ..cache import MOVED, RING_WRAPPED
from ..tiles import quantize_tile, rotate_tile, row_scale
from .emulation import P_EXPONENT

_RING_WRAPPED = tl.constexpr(RING_WRAPPED)
_MOVED = tl.constexpr(MOVED)
_SEGMENTS = tl.constexpr(MOVED + 1)
_P_EXPONENT = tl.constexpr(P_EXPONENT)
NOTHING_YET = tl.constexpr(-1e38)
"""Maximum of no logits: finite, so that what saw no key weighs nothing instead of NaN."""


@triton.jit
def take_tiles(
    q,
    q_factor,
    values,
    total,
    maximum,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_descriptor,
    v_descriptor,
    slot,
    head,
    k_token_stride,
    v_stride,
    base,
    first_tile,
    last_tile,
    low,
    high,
    run_stride,
    run_length,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over key tiles first_tile to last_tile of a segment that starts at token `base`.

    With MASKED only tokens from `low` to `high` count, and those that no run holds do not; a tile of an e4m3 cache is
    written as a whole, so that it can be loaded as a whole. The scale of e4m3 values goes into the exponent: p carries
    it, and the sum is freed of it tile by tile. `values` is [QUERIES, HEAD_DIM], over an e4m3 cache its transpose.
    """
    lane = tl.arange(0, HEAD_DIM)
    for tile in tl.range(first_tile, last_tile, num_stages=1 if MASKED and not QUANTIZED else None):
        first = base + tile * KEYS
        token = first + tl.arange(0, KEYS)
        if MASKED:
            end = tl.minimum(high, first // run_stride * run_stride + run_length)
            seen = (token >= low) & (token < end)
        if TMA:
            k = k_descriptor.load([slot, head, first, 0]).reshape(KEYS, HEAD_DIM)
            if QUANTIZED:
                v = v_descriptor.load([slot, head, 0, first]).reshape(HEAD_DIM, KEYS)
            else:
                v = v_descriptor.load([slot, head, first, 0]).reshape(KEYS, HEAD_DIM)
        elif QUANTIZED:
            k = tl.load(k_ptr + token[:, None] * k_token_stride + lane[None, :])
            v = tl.load(v_ptr + lane[:, None] * v_stride + token[None, :])
        else:
            k_rows = k_ptr + token[:, None] * k_token_stride + lane[None, :]
            v_rows = v_ptr + token[:, None] * v_stride + lane[None, :]
            k = tl.load(k_rows, mask=seen[:, None], other=0.0) if MASKED else tl.load(k_rows)
            v = tl.load(v_rows, mask=seen[:, None], other=0.0) if MASKED else tl.load(v_rows)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if QUANTIZED:
            s *= tl.load(k_scale_ptr + token)[None, :]
        if MASKED:
            s = tl.where(seen[None, :], s, float("-inf"))
        if QUANTIZED:
            v_scale = tl.load(v_scale_ptr + first // KEYS)
            s = s * q_factor[:, None] + tl.log2(v_scale)
            new_maximum = tl.maximum(maximum, tl.max(s, 1))
            p = tl.exp2(s - (new_maximum - _P_EXPONENT)[:, None])
        else:
            new_maximum = tl.maximum(maximum, tl.max(s, 1) * q_factor)
            p = tl.exp2(s * q_factor - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        if QUANTIZED:
            total = total * decay + tl.sum(p, 1) * tl.math.div_rn(1.0, v_scale)
            values = values * decay[None, :]
            # Transposed, so that p comes from shared memory: repacking it in registers would serialise wgmma.
            values = tl.dot(v, tl.trans(p.to(tl.float8e4nv)), values, input_precision=PRECISION)
        else:
            values = values * decay[:, None]
            total = total * decay + tl.sum(p, 1)
            values = tl.dot(p.to(v.dtype), v, values, input_precision=PRECISION)
        maximum = new_maximum
    return values, total, maximum


@triton.jit
def _queries(
    q_ptr,
    q_descriptor,
    head,
    first,
    tokens,
    q_token_stride,
    q_head_stride,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tile of queries in float32, zeros behind the last token."""
    if TMA:
        q = q_descriptor.load([head, first, 0]).reshape(QUERIES, HEAD_DIM)
    else:
        row = first + tl.arange(0, QUERIES)
        rows = q_ptr + head * q_head_stride + row[:, None] * q_token_stride
        q = tl.load(rows + tl.arange(0, HEAD_DIM)[None, :], mask=(row < tokens)[:, None], other=0.0)
    return q.to(tl.float32)


@triton.jit
def _counter_rotated(q, shift_ptr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """R(-s) q of float32 q: the same logits against stored keys as q has against keys moved by s."""
    pair = tl.arange(0, HEAD_DIM // 2)
    cos = tl.load(shift_ptr + pair, mask=pair < PAIRS, other=1.0)
    sin = tl.load(shift_ptr + PAIRS + pair, mask=pair < PAIRS, other=0.0)
    return rotate_tile(q, cos[None, :], -sin[None, :], QUERIES, HEAD_DIM)


@triton.jit
def attend(
    q_ptr,
    ring_k_ptr,
    ring_v_ptr,
    ring_k_scale_ptr,
    ring_v_scale_ptr,
    sink_k_ptr,
    sink_v_ptr,
    sink_k_scale_ptr,
    sink_v_scale_ptr,
    q_descriptor,
    out_descriptor,
    ring_k_descriptor,
    ring_v_descriptor,
    sink_k_descriptor,
    sink_v_descriptor,
    slots_ptr,
    segments_ptr,
    shift_ptr,
    out_ptr,
    partial_ptr,
    tokens,
    heads,
    group_heads,
    query_tiles,
    whole,
    parts,
    scale,
    q_token_stride,
    q_head_stride,
    ring_k_slot_stride,
    ring_v_slot_stride,
    ring_k_scale_slot_stride,
    ring_v_scale_slot_stride,
    ring_k_token_stride,
    ring_k_head_stride,
    ring_v_stride,
    ring_v_head_stride,
    ring_k_scale_head_stride,
    ring_v_scale_head_stride,
    sink_k_slot_stride,
    sink_v_slot_stride,
    sink_k_scale_slot_stride,
    sink_v_scale_slot_stride,
    sink_k_token_stride,
    sink_k_head_stride,
    sink_v_stride,
    sink_v_head_stride,
    sink_k_scale_head_stride,
    sink_v_scale_head_stride,
    ring_run_stride,
    ring_run_length,
    sink_run_stride,
    sink_run_length,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    QUANTIZED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries of one head, or one part of its keys.

    With TMA, descriptors of [slots, heads, tokens, head_dim] load whole tiles, and those of [heads, tokens, head_dim]
    load queries and store the result.

    The stride of values is that of tokens, in an e4m3 cache that of lanes.
    """
    program = tl.program_id(0)
    split = program >= whole
    item = tl.where(split, whole + (program - whole) // parts, program)
    part = tl.where(split, (program - whole) % parts, 0)
    part_count = tl.where(split, parts, 1)
    head = item // query_tiles
    first_query = (item % query_tiles) * QUERIES

    segments = segments_ptr + head // group_heads * 2 * _SEGMENTS
    key_tiles = 0
    for segment in tl.static_range(_SEGMENTS):
        start = tl.load(segments + 2 * segment)
        length = tl.load(segments + 2 * segment + 1)
        lead = start % KEYS if QUANTIZED else 0
        key_tiles += tl.where(length > 0, tl.cdiv(lead + length, KEYS), 0)
    part_first = part * key_tiles // part_count
    part_last = (part + 1) * key_tiles // part_count

    values = tl.zeros((HEAD_DIM, QUERIES) if QUANTIZED else (QUERIES, HEAD_DIM), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    maximum = tl.full((QUERIES,), NOTHING_YET, tl.float32)
    ring_slot = tl.load(slots_ptr).to(tl.int64)
    sink_slot = tl.load(slots_ptr + 1).to(tl.int64)
    before = 0
    for segment in tl.static_range(_SEGMENTS):
        if segment == 0 or segment == _MOVED:
            if segment == _MOVED:
                tl.debug_barrier()  # or the compiler keeps the first load in registers until here, and spills
            exact = _queries(
                q_ptr, q_descriptor, head, first_query, tokens, q_token_stride, q_head_stride, QUERIES, HEAD_DIM, TMA
            )
            if segment == _MOVED:
                exact = _counter_rotated(exact, shift_ptr, QUERIES, HEAD_DIM, PAIRS)
            if QUANTIZED:
                query_scale = row_scale(tl.max(tl.abs(exact), 1))
                query = quantize_tile(exact, query_scale[:, None])
                factor = query_scale * scale
            else:
                query = exact.to(q_ptr.dtype.element_ty)
                factor = scale
        if segment <= _RING_WRAPPED:
            k_ptr = ring_k_ptr + ring_slot * ring_k_slot_stride + head * ring_k_head_stride
            v_ptr = ring_v_ptr + ring_slot * ring_v_slot_stride + head * ring_v_head_stride
            k_scales = ring_k_scale_ptr + ring_slot * ring_k_scale_slot_stride + head * ring_k_scale_head_stride
            v_scales = ring_v_scale_ptr + ring_slot * ring_v_scale_slot_stride + head * ring_v_scale_head_stride
            k_token_stride, v_stride = ring_k_token_stride, ring_v_stride
            k_descriptor, v_descriptor, slot = ring_k_descriptor, ring_v_descriptor, ring_slot
            run_stride, run_length = ring_run_stride, ring_run_length
        else:
            k_ptr = sink_k_ptr + sink_slot * sink_k_slot_stride + head * sink_k_head_stride
            v_ptr = sink_v_ptr + sink_slot * sink_v_slot_stride + head * sink_v_head_stride
            k_scales = sink_k_scale_ptr + sink_slot * sink_k_scale_slot_stride + head * sink_k_scale_head_stride
            v_scales = sink_v_scale_ptr + sink_slot * sink_v_scale_slot_stride + head * sink_v_scale_head_stride
            k_token_stride, v_stride = sink_k_token_stride, sink_v_stride
            k_descriptor, v_descriptor, slot = sink_k_descriptor, sink_v_descriptor, sink_slot
            run_stride, run_length = sink_run_stride, sink_run_length
        start = tl.load(segments + 2 * segment)
        length = tl.load(segments + 2 * segment + 1)
        base = start // KEYS * KEYS if QUANTIZED else start
        end = start + length
        count = tl.where(length > 0, tl.cdiv(end - base, KEYS), 0)
        first = tl.minimum(tl.maximum(part_first - before, 0), count)
        last = tl.minimum(tl.maximum(part_last - before, 0), count)
        if QUANTIZED:
            values, total, maximum = take_tiles(
                query, factor, values, total, maximum, k_ptr, v_ptr, k_scales, v_scales,
                k_descriptor, v_descriptor, slot.to(tl.int32), head, k_token_stride, v_stride,
                base, first, last, start, end, run_stride, run_length,
                HEAD_DIM, KEYS, True, QUANTIZED, TMA, PRECISION,
            )  # fmt: skip
        else:
            full = tl.minimum(last, length // KEYS)
            values, total, maximum = take_tiles(
                query, factor, values, total, maximum, k_ptr, v_ptr, k_scales, v_scales,
                k_descriptor, v_descriptor, slot.to(tl.int32), head, k_token_stride, v_stride,
                base, first, full, start, end, run_stride, run_length,
                HEAD_DIM, KEYS, False, QUANTIZED, TMA, PRECISION,
            )  # fmt: skip
            tail = base + full * KEYS
            tail_tiles = tl.where((first < last) & (full < last), tl.cdiv(end - tail, TAIL), 0)
            values, total, maximum = take_tiles(
                query, factor, values, total, maximum, k_ptr, v_ptr, k_scales, v_scales,
                k_descriptor, v_descriptor, slot.to(tl.int32), head, k_token_stride, v_stride,
                tail, 0, tail_tiles, start, end, run_stride, run_length,
                HEAD_DIM, TAIL, True, QUANTIZED, False, PRECISION,
            )  # fmt: skip
        before += count

    if QUANTIZED:
        values = tl.trans(values)
    if split:
        store = partial_ptr + (program - whole).to(tl.int64) * QUERIES * (HEAD_DIM + 2)
        row, lane = tl.arange(0, QUERIES), tl.arange(0, HEAD_DIM)
        tl.store(store + row[:, None] * HEAD_DIM + lane[None, :], values)
        tl.store(store + QUERIES * HEAD_DIM + row, total)
        tl.store(store + QUERIES * (HEAD_DIM + 1) + row, maximum)
    else:
        out = (values / total[:, None]).to(out_ptr.dtype.element_ty)
        if TMA:
            out_descriptor.store([head, first_query, 0], out.reshape(1, QUERIES, HEAD_DIM))
        else:
            row, lane = first_query + tl.arange(0, QUERIES), tl.arange(0, HEAD_DIM)
            out_rows = out_ptr + (row[:, None] * heads + head) * HEAD_DIM
            tl.store(out_rows + lane[None, :], out, mask=(row < tokens)[:, None])


@triton.jit
def combine(
    partial_ptr,
    out_ptr,
    tokens,
    heads,
    query_tiles,
    whole,
    parts,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Add up the parts of a split tile, always in the same order."""
    rest = tl.program_id(0)
    rows = tl.arange(0, QUERIES)
    lane = tl.arange(0, HEAD_DIM)
    values = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    maximum = tl.full((QUERIES,), NOTHING_YET, tl.float32)
    for part in tl.range(0, parts):
        slot = partial_ptr + (rest * parts + part).to(tl.int64) * QUERIES * (HEAD_DIM + 2)
        part_maximum = tl.load(slot + QUERIES * (HEAD_DIM + 1) + rows)
        new_maximum = tl.maximum(maximum, part_maximum)
        decay, weight = tl.exp2(maximum - new_maximum), tl.exp2(part_maximum - new_maximum)
        part_values = tl.load(slot + rows[:, None] * HEAD_DIM + lane[None, :])
        values = values * decay[:, None] + part_values * weight[:, None]
        total = total * decay + tl.load(slot + QUERIES * HEAD_DIM + rows) * weight
        maximum = new_maximum
    item = whole + rest
    row = (item % query_tiles) * QUERIES + rows
    out = out_ptr + (row[:, None] * heads + item // query_tiles) * HEAD_DIM + lane[None, :]
    tl.store(out, (values / total[:, None]).to(out_ptr.dtype.element_ty), mask=(row < tokens)[:, None])
