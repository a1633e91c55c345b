"""Ring write in Triton: programs normalise, rotate and store tokens, and others the tiles of e4m3 values.

Tokens that come normalised are only rotated and stored; no weight is read then.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..aot import E4M3_CAPABILITY, KernelSpec, kernel_spec
from ..cache import KeyValueCache
from ..dispatch import rows_per_program
from ..e4m3 import KV_TILE, padded_to_tile
from ..model_sizes import ModelSizes
from ..rotation import Angles
from ..tiles import quantize_tile, row_scale

_WARP_VALUES = 1024
_TILE_VALUES = 2048
"""Of a program that takes several tokens."""
_VALUE_WARPS = 4
_POINTERS = {"at_ptr": "*i32"} | dict.fromkeys(("time_ptr", "space_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32")
_QUANTIZED_POINTERS = {"cache_k_ptr": "*fp8e4nv", "cache_v_ptr": "*fp8e4nv"}


@triton.jit
def _normalised(x_ptr, weight_ptr, eps, offsets, mask, DIM: tl.constexpr, NORMALISE: tl.constexpr):
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if NORMALISE:
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean_square = tl.sum(tl.sum(x * x, axis=2, keep_dims=True), axis=1, keep_dims=True) / DIM
        x = x * tl.math.rsqrt(mean_square + eps) * weight
    return x


@triton.jit
def _rotated(x, cos, sin, ROWS: tl.constexpr, HEAD_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (ROWS, HEAD_ROWS, HEAD_DIM // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, HEAD_ROWS, HEAD_DIM))


@triton.jit
def write_tokens(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    time_ptr,
    space_ptr,
    at_ptr,
    rotated_ptr,
    cache_k_ptr,
    cache_v_ptr,
    k_scale_ptr,
    q_stride,
    k_stride,
    v_stride,
    k_slot_stride,
    k_token_stride,
    k_head_stride,
    v_slot_stride,
    v_token_stride,
    v_head_stride,
    scale_slot_stride,
    scale_head_stride,
    frame_tokens,
    cache_tokens,
    tokens,
    eps,
    HEADS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TIME_PAIRS: tl.constexpr,
    SPACE_PAIRS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    ROWS: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """ROWS tokens: q -> rotated, k -> its slot, v -> its slot unless the cache is quantised."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    head = tl.arange(0, HEAD_ROWS)[None, :, None]
    lane = tl.arange(0, HEAD_DIM)[None, None, :]
    pair = tl.arange(0, HEAD_DIM // 2)[None, None, :]
    inside = token < tokens if ROWS > 1 else True
    offsets, mask = head * HEAD_DIM + lane, (head < HEADS) & inside

    temporal, spatial = (pair < TIME_PAIRS) & inside, (pair >= TIME_PAIRS) & inside
    time = time_ptr + (token // frame_tokens) * 2 * TIME_PAIRS + pair
    space = space_ptr + (token % frame_tokens) * 2 * SPACE_PAIRS + pair - TIME_PAIRS
    cos = tl.load(time, mask=temporal, other=0.0) + tl.load(space, mask=spatial, other=0.0)
    sin = tl.load(time + TIME_PAIRS, mask=temporal, other=0.0)
    sin += tl.load(space + SPACE_PAIRS, mask=spatial, other=0.0)

    q = _normalised(q_ptr + token * q_stride, q_weight_ptr, eps, offsets, mask, HEADS * HEAD_DIM, NORMALISE)
    q = _rotated(q, cos, sin, ROWS, HEAD_ROWS, HEAD_DIM)
    tl.store(rotated_ptr + token * HEADS * HEAD_DIM + offsets, q.to(rotated_ptr.dtype.element_ty), mask=mask)

    slot = tl.load(at_ptr).to(tl.int64)
    position = tl.load(at_ptr + 1) + token
    position = tl.where(position >= cache_tokens, position - cache_tokens, position)
    k = _normalised(k_ptr + token * k_stride, k_weight_ptr, eps, offsets, mask, HEADS * HEAD_DIM, NORMALISE)
    k = _rotated(k, cos, sin, ROWS, HEAD_ROWS, HEAD_DIM)
    k_out = cache_k_ptr + slot * k_slot_stride + position * k_token_stride + head * k_head_stride + lane
    if QUANTIZED:
        scale = row_scale(tl.max(tl.abs(k), axis=2, keep_dims=True))
        tl.store(k_out, quantize_tile(k, scale), mask=mask)
        scales = k_scale_ptr + slot * scale_slot_stride + head * scale_head_stride + position
        tl.store(scales, scale, mask=mask)
    else:
        tl.store(k_out, k.to(cache_k_ptr.dtype.element_ty), mask=mask)
        v = tl.load(v_ptr + token * v_stride + offsets, mask=mask, other=0.0)
        v_out = cache_v_ptr + slot * v_slot_stride + position * v_token_stride + head * v_head_stride + lane
        tl.store(v_out, v, mask=mask)


@triton.jit
def write_value_tiles(
    v_ptr,
    at_ptr,
    cache_k_ptr,
    cache_v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    v_stride,
    k_slot_stride,
    k_token_stride,
    k_head_stride,
    v_slot_stride,
    v_head_stride,
    v_lane_stride,
    k_scale_slot_stride,
    k_scale_head_stride,
    v_scale_slot_stride,
    v_scale_head_stride,
    tokens,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one head: values transposed with a scale of their own; keys of unused tokens zeroed.

    The grid covers one tile more than the block fills at best; what starts behind the block writes nothing.
    """
    slot = tl.load(at_ptr).to(tl.int64)
    start = tl.load(at_ptr + 1)
    head = tl.program_id(1)
    first = (start // TILE + tl.program_id(0)) * TILE
    if first < start + tokens:
        position = first + tl.arange(0, TILE)
        token = position - start
        lane = tl.arange(0, HEAD_DIM)
        inside = (token >= 0) & (token < tokens)
        source = v_ptr + token[:, None] * v_stride + head * HEAD_DIM + lane[None, :]
        v = tl.load(source, mask=inside[:, None], other=0.0).to(tl.float32)
        scale = row_scale(tl.max(tl.max(tl.abs(v), axis=1), axis=0))
        tl.store(v_scale_ptr + slot * v_scale_slot_stride + head * v_scale_head_stride + first // TILE, scale)
        out = cache_v_ptr + slot * v_slot_stride + head * v_head_stride
        out += lane[:, None] * v_lane_stride + position[None, :]
        tl.store(out, tl.trans(quantize_tile(v, scale)))

        unused = ~inside
        k_out = cache_k_ptr + slot * k_slot_stride + position[:, None] * k_token_stride + head * k_head_stride
        zeros = tl.zeros((TILE, HEAD_DIM), tl.float32).to(cache_k_ptr.dtype.element_ty)
        tl.store(k_out + lane[None, :], zeros, mask=unused[:, None])
        k_scales = k_scale_ptr + slot * k_scale_slot_stride + head * k_scale_head_stride + position
        tl.store(k_scales, row_scale(tl.zeros((TILE,), tl.float32)), mask=unused)


def ring_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    angles: Angles,
    cache: KeyValueCache,
    at: Tensor,
    *,
    eps: float,
    rows: int | None = None,
) -> Tensor:
    """As the op. `rows` are the tokens of a program, a power of two."""
    tokens, heads, head_dim = q.shape
    rotated = q.new_empty(q.shape)
    scales = cache.k_scale if cache.k_scale is not None else cache.k
    v_strides = (cache.v.stride(0), cache.v.stride(1), cache.v.stride(2))
    constexprs, warps = _tiling(heads, head_dim, q.device.type, rows)
    write_tokens[(triton.cdiv(tokens, constexprs["ROWS"]),)](
        q,
        k,
        v,
        q if q_weight is None else q_weight,
        k if k_weight is None else k_weight,
        angles.time,
        angles.space,
        at,
        rotated,
        cache.k,
        cache.v,
        scales,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        *cache.k.stride()[:3],
        *v_strides,
        *scales.stride()[:2],
        angles.space.shape[0],
        cache.tokens,
        tokens,
        eps,
        **constexprs,
        TIME_PAIRS=angles.time.shape[-1],
        SPACE_PAIRS=angles.space.shape[-1],
        QUANTIZED=cache.quantized,
        NORMALISE=q_weight is not None,
        num_warps=warps,
    )
    if cache.quantized:
        assert cache.k_scale is not None
        assert cache.v_scale is not None
        write_value_tiles[(padded_to_tile(tokens) // KV_TILE + 1, heads)](
            v,
            at,
            cache.k,
            cache.v,
            cache.k_scale,
            cache.v_scale,
            v.stride(0),
            *cache.k.stride()[:3],
            *v_strides,
            *cache.k_scale.stride()[:2],
            *cache.v_scale.stride()[:2],
            tokens,
            HEAD_DIM=head_dim,
            TILE=KV_TILE,
            num_warps=_VALUE_WARPS,
        )
    return rotated


def _tiling(heads: int, head_dim: int, device: str, rows: int | None = None) -> tuple[dict[str, int], int]:
    """Constexprs of `write_tokens` that follow from the sizes of a token, and its warps."""
    head_rows = triton.next_power_of_2(heads)
    rows = rows or rows_per_program(head_rows * head_dim, _TILE_VALUES, device)
    warps = min(8, max(1, rows * head_rows * head_dim // _WARP_VALUES))
    return {"HEADS": heads, "HEAD_ROWS": head_rows, "HEAD_DIM": head_dim, "ROWS": rows}, warps


def aot_specs(sizes: ModelSizes, capability: int) -> list[KernelSpec]:
    """The kernels of a block at `sizes` on sm_`capability`, and those of half the heads, which come normalised."""
    dtypes = (False, True) if capability >= E4M3_CAPABILITY else (False,)
    specs = [_tokens_spec(sizes, normalise, quantized) for normalise in (True, False) for quantized in dtypes]
    if capability >= E4M3_CAPABILITY:
        specs.append(
            kernel_spec(
                "ring_write value tiles e4m3 cache",
                write_value_tiles,
                "bf16",
                {"HEAD_DIM": sizes.head_dim, "TILE": KV_TILE},
                {"num_warps": _VALUE_WARPS},
                _POINTERS | _QUANTIZED_POINTERS,
            )
        )
    return specs


def _tokens_spec(sizes: ModelSizes, normalise: bool, quantized: bool) -> KernelSpec:
    constexprs, warps = _tiling(sizes.heads if normalise else sizes.heads // 2, sizes.head_dim, "cuda")
    return kernel_spec(
        f"ring_write {'tokens' if normalise else 'normalised tokens'} {'e4m3' if quantized else 'bf16'} cache",
        write_tokens,
        "bf16",
        {
            **constexprs,
            "TIME_PAIRS": sizes.time_pairs,
            "SPACE_PAIRS": sizes.space_pairs,
            "QUANTIZED": quantized,
            "NORMALISE": normalise,
        },
        {"num_warps": warps},
        _POINTERS | (_QUANTIZED_POINTERS if quantized else {}),
    )
