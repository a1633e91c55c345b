"""Ring attention in Triton: how its kernels are launched, and how they are compiled ahead of time.

The tiles of the last, incomplete wave are split over keys; a second kernel combines their parts in a fixed order.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..aot import E4M3_CAPABILITY, KernelSpec, kernel_spec
from ..cache import KeyValueCache, Window
from ..dispatch import capability_of, processors_of
from ..model_sizes import ModelSizes
from .device import attend, combine
from .emulation import LOG2_E
from .tiling import Split, Tiling


def ring_attention(
    q: Tensor,
    ring: KeyValueCache,
    sink: KeyValueCache,
    window: Window,
    *,
    processors: int | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """As the op. `processors` are those that the last wave is split for; both follow from the device if None."""
    tokens, heads, head_dim = q.shape
    tiling = tiling or Tiling.of(capability_of(q.device), head_dim, ring.k.itemsize)
    query_tiles = triton.cdiv(tokens, tiling.queries)
    key_tiles = triton.cdiv(ring.tokens + sink.tokens, tiling.keys)
    split = Split.of(query_tiles * heads, processors or processors_of(q.device), key_tiles)
    out = q.new_empty(q.shape)
    partial = q.new_empty(split.rest * split.parts * tiling.queries * (head_dim + 2), dtype=torch.float32)
    attend[(split.programs,)](
        q,
        *_pointers(ring),
        *_pointers(sink),
        *(_descriptors(q, out, ring, sink, tiling) if tiling.tma else (None,) * len(_DESCRIPTORS)),
        *window,
        out,
        partial,
        tokens,
        heads,
        heads // window.segments.shape[0],
        query_tiles,
        split.whole,
        split.parts,
        head_dim**-0.5 * LOG2_E,
        *q.stride()[:2],
        *_strides(ring),
        *_strides(sink),
        ring.run_stride,
        ring.run_length,
        sink.run_stride,
        sink.run_length,
        HEAD_DIM=head_dim,
        PAIRS=window.shift.shape[-1],
        QUERIES=tiling.queries,
        KEYS=tiling.keys,
        TAIL=tiling.tail,
        QUANTIZED=ring.quantized,
        TMA=tiling.tma,
        PRECISION="ieee",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if split.rest:
        combine[(split.rest,)](
            partial,
            out,
            tokens,
            heads,
            query_tiles,
            split.whole,
            split.parts,
            HEAD_DIM=head_dim,
            QUERIES=tiling.queries,
            num_warps=tiling.warps,
        )
    return out


def _pointers(cache: KeyValueCache) -> tuple[Tensor, ...]:
    """Keys, values and scales; of a cache without scales, keys and values stand in for them, unread."""
    if cache.k_scale is None or cache.v_scale is None:
        return cache.k, cache.v, cache.k, cache.v
    return cache.k, cache.v, cache.k_scale, cache.v_scale


def _descriptors(
    q: Tensor, out: Tensor, ring: KeyValueCache, sink: KeyValueCache, tiling: Tiling
) -> list[TensorDescriptor]:
    """In the kernel's order."""
    head_dim = q.shape[-1]
    rows = [1, tiling.queries, head_dim]
    found = [TensorDescriptor.from_tensor(x.transpose(0, 1), rows) for x in (q, out)]
    for cache in (ring, sink):
        keys = [1, 1, tiling.keys, head_dim]
        found.append(TensorDescriptor.from_tensor(cache.k.transpose(1, 2), keys))
        if cache.quantized:
            found.append(TensorDescriptor.from_tensor(cache.v, [1, 1, head_dim, tiling.keys]))
        else:
            found.append(TensorDescriptor.from_tensor(cache.v.transpose(1, 2), keys))
    return found


def _strides(cache: KeyValueCache) -> tuple[int, ...]:
    """Strides in the kernel's order: of the slots, then of tokens (lanes of e4m3 values) and heads."""
    k, v, k_scale, v_scale = _pointers(cache)
    token, head = (2, 1) if cache.quantized else (1, 2)
    slots = (k.stride(0), v.stride(0), k_scale.stride(0), v_scale.stride(0))
    return (
        *slots, k.stride(1), k.stride(2), v.stride(token), v.stride(head), k_scale.stride(1), v_scale.stride(1),
    )  # fmt: skip


def aot_specs(sizes: ModelSizes, capability: int) -> list[KernelSpec]:
    """The kernels of a block at `sizes` on sm_`capability`."""
    specs = []
    for quantized in (False, True) if capability >= E4M3_CAPABILITY else (False,):
        tiling = Tiling.of(capability, sizes.head_dim, 1 if quantized else 2)
        caches = {f"{cache}_{x}_ptr": "*fp8e4nv" for cache in ("ring", "sink") for x in "kv"} if quantized else {}
        specs.append(
            kernel_spec(
                f"ring_attention {'e4m3' if quantized else 'bf16'} {tiling.queries}x{tiling.keys}",
                attend,
                "bf16",
                {
                    "HEAD_DIM": sizes.head_dim,
                    "PAIRS": sizes.time_pairs,
                    "QUERIES": tiling.queries,
                    "KEYS": tiling.keys,
                    "TAIL": tiling.tail,
                    "QUANTIZED": quantized,
                    "TMA": tiling.tma,
                    "PRECISION": "ieee",
                    **({} if tiling.tma else dict.fromkeys(_DESCRIPTORS)),
                },
                {"num_warps": tiling.warps, "num_stages": tiling.stages},
                _POINTERS | caches | _descriptor_types(tiling, sizes.head_dim, quantized),
                matrix=True,
            )
        )
    specs.append(
        kernel_spec(
            "ring_attention combine",
            combine,
            "bf16",
            {"HEAD_DIM": sizes.head_dim, "QUERIES": tiling.queries},
            {"num_warps": tiling.warps},
            _POINTERS,
        )
    )
    return specs


def _descriptor_types(tiling: Tiling, head_dim: int, quantized: bool) -> dict[str, str]:
    if not tiling.tma:
        return {}
    queries = f"tensordesc<bf16[1, {tiling.queries}, {head_dim}]>"
    keys = f"1, 1, {tiling.keys}, {head_dim}"
    values = f"1, 1, {head_dim}, {tiling.keys}" if quantized else keys
    element = "fp8e4nv" if quantized else "bf16"
    caches = [f"tensordesc<{element}[{shape}]>" for shape in (keys, values, keys, values)]
    return dict(zip(_DESCRIPTORS, (queries, queries, *caches), strict=True))


_DESCRIPTORS = (
    "q_descriptor",
    "out_descriptor",
    *(f"{cache}_{x}_descriptor" for cache in ("ring", "sink") for x in "kv"),
)
_POINTERS = {
    **{f"{cache}_{x}_scale_ptr": "*fp32" for cache in ("ring", "sink") for x in "kv"},
    "slots_ptr": "*i32",
    "segments_ptr": "*i32",
    "shift_ptr": "*fp32",
    "partial_ptr": "*fp32",
}
