"""Ring attention for Hopper in Gluon, over bf16 and fp16 caches: its launch, and what is compiled ahead of time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..aot import KernelSpec, kernel_spec
from ..cache import KeyValueCache, Window
from ..dispatch import processors_of
from ..model_sizes import ModelSizes
from .device import combine
from .emulation import LOG2_E
from .gluon_device import ROWS, attend
from .tiling import Split, Tiling

CAPABILITY = 90
_CONSUMER_REGISTERS = 240


def tiling(head_dim: int) -> Tiling:
    """As many stages as shared memory holds, up to four."""
    return Tiling(2 * ROWS.value, 128, 4, 3 if head_dim == 128 else 4, tma=True)


def ring_attention(
    q: Tensor, ring: KeyValueCache, sink: KeyValueCache, window: Window, *, processors: int | None = None
) -> Tensor:
    """As the op, for bf16 and fp16. The last wave is split for `processors`, those of the device if None."""
    tokens, heads, head_dim = q.shape
    tiles = tiling(head_dim)
    query_tiles = triton.cdiv(tokens, tiles.queries)
    split = Split.of(
        query_tiles * heads, processors or processors_of(q.device), triton.cdiv(ring.tokens + sink.tokens, tiles.keys)
    )
    out = q.new_empty(q.shape)
    partial = q.new_empty(split.rest * split.parts * tiles.queries * (head_dim + 2), dtype=torch.float32)
    attend[(split.programs,)](
        q,
        *(_descriptor(x, tiles) for cache in (ring, sink) for x in (cache.k, cache.v)),
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
        **_constexprs(head_dim, window.shift.shape[-1], tiles),
        num_warps=tiles.warps,
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
            QUERIES=tiles.queries,
            num_warps=8,
        )
    return out


def _constexprs(head_dim: int, pairs: int, tiles: Tiling) -> dict[str, int]:
    return {
        "HEAD_DIM": head_dim,
        "PAIRS": pairs,
        "KEYS": tiles.keys,
        "STAGES": tiles.stages,
        "REGISTERS": _CONSUMER_REGISTERS,
    }


def _descriptor(x: Tensor, tiles: Tiling) -> TensorDescriptor:
    """Keys or values of a cache, [slots, heads, tokens, head_dim]."""
    box = [1, 1, tiles.keys, x.shape[-1]]
    element = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(x.transpose(1, 2), box, gl.NVMMASharedLayout.get_default_for(box, element))


def aot_specs(sizes: ModelSizes, capability: int) -> list[KernelSpec]:
    """The kernel of a block at `sizes`; none but for sm_90. `combine` is a spec of `kernel`."""
    if capability != CAPABILITY:
        return []
    tiles = tiling(sizes.head_dim)
    box = [1, 1, tiles.keys, sizes.head_dim]
    cache = f"tensordesc<bf16{box},{gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)!r}>"
    types: dict[str, Any] = {name: cache for name in attend.arg_names if name.endswith("_descriptor")}
    types |= {"slots_ptr": "*i32", "segments_ptr": "*i32", "shift_ptr": "*fp32", "partial_ptr": "*fp32"}
    spec = kernel_spec(
        f"ring_attention gluon bf16 {tiles.queries}x{tiles.keys}",
        attend,
        "bf16",
        _constexprs(sizes.head_dim, sizes.time_pairs, tiles),
        {"num_warps": tiles.warps},
        types,
        matrix=True,
    )
    return [replace(spec, gluon=True)]
