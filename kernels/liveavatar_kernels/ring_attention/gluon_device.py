"""What runs on a Hopper GPU, in Gluon, over bf16 and fp16 caches: a producer warpgroup, two consumers of 64 queries.

It computes what `device.attend` computes, to the order of the sums. A program visits the key tiles of its part one
after the other, those of all segments, and i below counts them from 0; stage = i % STAGES, turn = i // STAGES. Every
program visits at least one tile, in an empty part one without keys. Barriers, each with the arrivals of a phase:

    k_full[stage]   1, the producer, with the bytes that TMA writes
    v_full[stage]   1, the producer: the same, or by itself once the rows behind a segment's end are cleared
    k_empty[stage]  2, each consumer once its QK^T of the tile is done
    v_empty[stage]  2, each consumer once its PV of the tile is done; never of its last tile
    cleared         1, the producer, with the bytes of a tile whose rows it is about to clear; it waits at once
    turns[half]     1, the other consumer, once it has issued a tile's products; from the second tile on

All are used once a tile (`cleared`: once a clearing), so that i gives the phase: whoever waits for a full stage waits
for parity turn & 1, the producer for an empty one for (turn & 1) ^ 1, which a new barrier has already passed. Of a
tile every consumer waits for both full barriers, and arrives at each empty one that the producer may wait for: all
three count the same tiles, from the same numbers. The consumers take turns, so that one computes exponentials while
the other's products run: half 0 waits for parity (i & 1) ^ 0 and passes a new barrier at i = 1, half 1 follows it.

Keys behind a segment's end are masked in the logits. Values there may be NaN, which no weight of 0 removes: they are
cleared in shared memory before the tile is handed over. Queries are written by their own consumer alone, when it has
no product in flight. What ordinary stores wrote is fenced for the matrix unit before the barrier that follows them.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# Device functions are typed by Triton.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)
"""Queries of a consumer, the rows of one matrix instruction."""
_NOTHING_YET = gl.constexpr(-1e38)
"""Maximum of no logits: finite, so that what saw no key weighs nothing instead of NaN."""
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.9


@gluon.jit
def locate(tile, last, start0, length0, start1, length1, start2, length2, start3, length3, KEYS):
    """First token of a tile, and how many of its keys count: KEYS or more if all do, 0 or less if none does.

    Tiles are counted through the segments, each of which starts on a tile of its own. From tile `last` on none counts.
    """
    end0 = (length0 + KEYS - 1) // KEYS
    end1 = end0 + (length1 + KEYS - 1) // KEYS
    end2 = end1 + (length2 + KEYS - 1) // KEYS
    token = start3 + (tile - end2) * KEYS
    end = start3 + length3
    if tile < end2:
        token = start2 + (tile - end1) * KEYS
        end = start2 + length2
    if tile < end1:
        token = start1 + (tile - end0) * KEYS
        end = start1 + length1
    if tile < end0:
        token = start0 + tile * KEYS
        end = start0 + length0
    left = end - token
    if tile >= last:
        left = 0
    return token, left


@gluon.jit
def _load_tile(ring, sink, slots, head, token, in_ring, full, buffer):
    mbarrier.expect(full, ring.block_type.nbytes)
    if in_ring:
        _copy(ring, [slots[0], head, token, 0], full, buffer)
    else:
        _copy(sink, [slots[1], head, token, 0], full, buffer)


@gluon.jit
def _clear_rows(tile, left, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Write zeros to the rows of a tile in shared memory from row `left` on, in pieces that take few registers."""
    COLUMNS: gl.constexpr = min(HEAD_DIM, 64)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    row = gl.arange(0, 16, gl.SliceLayout(1, layout))
    for first in gl.static_range(0, KEYS, 16):
        if left < first + 16:
            for lane in gl.static_range(0, HEAD_DIM, COLUMNS):
                piece = tile.slice(first, 16).slice(lane, COLUMNS, 1)
                x = piece.load(layout)
                piece.store(gl.where((row < left - first)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.jit
def _produce(
    descriptors,
    slots,
    head,
    schedule,
    keys,
    values,
    barriers,
    HEAD_DIM: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill stages with keys and values."""
    ring_k, ring_v, sink_k, sink_v = descriptors
    first, last, ring_tiles, _still_tiles, table = schedule
    k_full, v_full, k_empty, v_empty, cleared = barriers
    clearings = 0
    for i in range(gl.maximum(last - first, 1)):
        tile = first + i
        token, left = locate(tile, last, *table, KEYS)
        in_ring = tile < ring_tiles
        stage = i % STAGES
        free = (i // STAGES & 1) ^ 1
        mbarrier.wait(k_empty.index(stage), free)
        _load_tile(ring_k, sink_k, slots, head, token, in_ring, k_full.index(stage), keys.index(stage))
        mbarrier.wait(v_empty.index(stage), free)
        if left >= KEYS:
            _load_tile(ring_v, sink_v, slots, head, token, in_ring, v_full.index(stage), values.index(stage))
        else:
            _load_tile(ring_v, sink_v, slots, head, token, in_ring, cleared, values.index(stage))
            mbarrier.wait(cleared, clearings & 1)
            clearings += 1
            _clear_rows(values.index(stage).reshape([KEYS, HEAD_DIM]), left, KEYS, HEAD_DIM)
            mbarrier.arrive(v_full.index(stage), count=1)


@gluon.jit
def _put_queries(
    buffer,
    q_ptr,
    first,
    tokens,
    q_token_stride,
    shift_ptr,
    turned,
    HEAD_DIM: gl.constexpr,
    PAIRS: gl.constexpr,
):
    """Write queries to shared memory, zeros behind the last token; if `turned`, rotated back by the moved keys' shift.

    R(-s) q has the same logits against stored keys as q has against keys moved by s.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    lane = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    rows = q_ptr + row[:, None] * q_token_stride + lane[None, :]
    x = gl.load(rows, mask=(row < tokens)[:, None], other=0.0).to(gl.float32)
    even, odd = gl.split(gl.reshape(x, [ROWS, HEAD_DIM // 2, 2]))
    pair = gl.arange(0, HEAD_DIM // 2, gl.SliceLayout(0, even.type.layout))
    turns = (pair < PAIRS) & turned
    cos = gl.load(shift_ptr + pair, mask=turns, other=1.0)[None, :]
    sin = gl.load(shift_ptr + PAIRS + pair, mask=turns, other=0.0)[None, :]
    x = gl.reshape(gl.join(even * cos + odd * sin, odd * cos - even * sin), [ROWS, HEAD_DIM])
    buffer.store(gl.convert_layout(x, layout).to(buffer.dtype))
    fence_async_shared()


@gluon.jit
def _weigh(s, total, maximum, left, scale, KEYS: gl.constexpr):
    """Online softmax of a tile's logits: weights, new total and maximum, and what older values are multiplied by."""
    if left < KEYS:
        column = gl.arange(0, KEYS, gl.SliceLayout(0, s.type.layout))
        s = gl.where((column < left)[None, :], s, float("-inf"))
    new_maximum = gl.maximum(maximum, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - new_maximum[:, None])
    decay = gl.exp2(maximum - new_maximum)
    return p, total * decay + gl.sum(p, 1), new_maximum, decay


@gluon.jit
def _logits(q, keys, stage, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Issue the product of queries and a tile's keys."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    nothing = gl.zeros([ROWS, KEYS], gl.float32, layout)
    k = keys.index(stage).reshape([KEYS, HEAD_DIM]).permute((1, 0))
    return warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)


@gluon.jit
def _consume(
    half,
    q,
    keys,
    values,
    barriers,
    turns,
    pointers,
    schedule,
    place,
    scale,
    q_token_stride,
    HEAD_DIM: gl.constexpr,
    PAIRS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attend 64 queries to the tiles from `first` to `last`; those from `still_tiles` on see turned queries.

    While the exponentials of a tile are computed, the product of the weights and values before it runs.
    """
    k_full, v_full, k_empty, v_empty, _cleared = barriers
    q_ptr, shift_ptr, out_ptr, partial_ptr = pointers
    first, last, _ring_tiles, still_tiles, table = schedule
    first_query, tokens = place[0], place[1]
    gl.static_assert(STAGES >= 2, "a tile's values are awaited before those of the tile before are released")
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    o = gl.zeros([ROWS, HEAD_DIM], gl.float32, o_layout)
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
    maximum = gl.full([ROWS], _NOTHING_YET, gl.float32, gl.SliceLayout(1, s_layout))
    row = first_query + half * ROWS

    _put_queries(q, q_ptr, row, tokens, q_token_stride, shift_ptr, first >= still_tiles, HEAD_DIM, PAIRS)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[_logits(q, keys, 0, KEYS, HEAD_DIM)])
    mbarrier.arrive(k_empty.index(0), count=1)
    _token, left = locate(first, last, *table, KEYS)
    weights, total, maximum, _decay = _weigh(s, total, maximum, left, scale, KEYS)
    p = gl.convert_layout(weights.to(q.dtype), p_layout)
    mbarrier.wait(v_full.index(0), 0)

    count = gl.maximum(last - first, 1)
    for i in range(1, count):
        stage = i % STAGES
        before = (i - 1) % STAGES
        if first + i == still_tiles:
            _put_queries(q, q_ptr, row, tokens, q_token_stride, shift_ptr, True, HEAD_DIM, PAIRS)
        mbarrier.wait(k_full.index(stage), i // STAGES & 1)
        mbarrier.wait(turns.index(half), (i & 1) ^ half)
        s = _logits(q, keys, stage, KEYS, HEAD_DIM)
        o = warpgroup_mma(p, values.index(before).reshape([KEYS, HEAD_DIM]), o, is_async=True)
        mbarrier.arrive(turns.index(1 - half), count=1)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        _token, left = locate(first + i, last, *table, KEYS)
        weights, total, maximum, decay = _weigh(s, total, maximum, left, scale, KEYS)
        p = gl.convert_layout(weights.to(q.dtype), p_layout)
        # Needed for the next tile only, but without a loop between them ptxas moves the exponentials behind the wait.
        mbarrier.wait(v_full.index(stage), i // STAGES & 1)
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(v_empty.index(before), count=1)
        o = o * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
    o = warpgroup_mma(p, values.index((count - 1) % STAGES).reshape([KEYS, HEAD_DIM]), o)

    total = gl.convert_layout(total, gl.SliceLayout(1, o_layout))
    maximum = gl.convert_layout(maximum, gl.SliceLayout(1, o_layout))
    _store(o, total, maximum, half, out_ptr, partial_ptr, place, o_layout, HEAD_DIM)


@gluon.jit
def _store(
    o,
    total,
    maximum,
    half,
    out_ptr,
    partial_ptr,
    place,
    layout: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """Write the result, or the part's values, total and maximum where `combine` reads them."""
    first_query, tokens, heads, head, split = place
    row = half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    lane = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    if split:
        gl.store(partial_ptr + row[:, None] * HEAD_DIM + lane[None, :], o)
        gl.store(partial_ptr + 2 * ROWS * HEAD_DIM + row, total)
        gl.store(partial_ptr + 2 * ROWS * (HEAD_DIM + 1) + row, maximum)
    else:
        query = first_query + row
        out = (o / total[:, None]).to(out_ptr.dtype.element_ty)
        out_rows = out_ptr + (query[:, None] * heads + head) * HEAD_DIM
        gl.store(out_rows + lane[None, :], out, mask=(query < tokens)[:, None])


@gluon.jit
def _barriers(arrivals: gl.constexpr, STAGES: gl.constexpr):
    found = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(found.index(stage), count=arrivals)
    return found


@gluon.jit
def attend(
    q_ptr,
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
    HEAD_DIM: gl.constexpr,
    PAIRS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """One tile of queries of one head, or one part of its keys; programs count as those of `device.attend`.

    Descriptors are of [slots, heads, tokens, head_dim].
    """
    program = gl.program_id(0)
    split = program >= whole
    item = gl.where(split, whole + (program - whole) // parts, program)
    part = gl.where(split, (program - whole) % parts, 0)
    part_count = gl.where(split, parts, 1)
    head = item // query_tiles
    first_query = (item % query_tiles) * (2 * ROWS)
    partial_ptr += (program - whole).to(gl.int64) * (2 * ROWS * (HEAD_DIM + 2))

    rows = segments_ptr + head // group_heads * 8
    length0, length1, length2, length3 = gl.load(rows + 1), gl.load(rows + 3), gl.load(rows + 5), gl.load(rows + 7)
    table = (
        gl.load(rows), length0, gl.load(rows + 2), length1, gl.load(rows + 4), length2, gl.load(rows + 6), length3,
    )  # fmt: skip
    slots = (gl.load(slots_ptr), gl.load(slots_ptr + 1))
    ring_tiles = gl.cdiv(length0, KEYS) + gl.cdiv(length1, KEYS)
    still_tiles = ring_tiles + gl.cdiv(length2, KEYS)
    tiles = still_tiles + gl.cdiv(length3, KEYS)
    first = part * tiles // part_count
    last = (part + 1) * tiles // part_count
    schedule = (first, last, ring_tiles, still_tiles, table)
    place = (first_query, tokens, heads, head, split)

    dtype: gl.constexpr = ring_k_descriptor.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    q = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], q_layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, HEAD_DIM], ring_k_descriptor.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, HEAD_DIM], ring_v_descriptor.layout)
    k_full, v_full = _barriers(1, STAGES), _barriers(1, STAGES)
    k_empty, v_empty = _barriers(2, STAGES), _barriers(2, STAGES)
    barriers = (k_full, v_full, k_empty, v_empty, _barriers(1, 1).index(0))
    turns = _barriers(1, 2)
    fence_async_shared()

    descriptors = (ring_k_descriptor, ring_v_descriptor, sink_k_descriptor, sink_v_descriptor)
    pointers = (q_ptr + head * q_head_stride, shift_ptr, out_ptr, partial_ptr)
    # The producer is the default partition, though it needs one thread only: there ptxas keeps its addresses out of the
    # consumers' registers, and it is left the registers that they do not take.
    gl.warp_specialize(
        [
            (_produce, (descriptors, slots, head, schedule, keys, values, barriers, HEAD_DIM, KEYS, STAGES)),
            (_consume, (0, q.index(0), keys, values, barriers, turns, pointers, schedule, place, scale, q_token_stride,
                        HEAD_DIM, PAIRS, KEYS, STAGES)),
            (_consume, (1, q.index(1), keys, values, barriers, turns, pointers, schedule, place, scale, q_token_stride,
                        HEAD_DIM, PAIRS, KEYS, STAGES)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip
