"""Normalise and rotate a block's queries and keys, and store its keys and values in their slots.

q, k <- R(position) RMSNorm(q), R(position) RMSNorm(k), the norm over all heads together; the cache takes k and v. Where
a device has only some of the heads, the norm cannot be taken here: then q and k come normalised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cache import KeyValueCache
from ..dispatch import ANYWHERE, Implementation, Op, never_absent, on_device, refuses_e4m3, triton_absent
from ..rotation import Angles
from . import reference


def _triton(*arguments: Any, **keywords: Any) -> Tensor:
    from . import kernel

    return kernel.ring_write(*arguments, **keywords)


OP = Op(
    "ring_write",
    (
        Implementation("triton", _triton, triton_absent, automatic=("cuda",)),
        Implementation("reference", reference.ring_write, never_absent, automatic=ANYWHERE),
    ),
)


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
    implementation: str | None = None,
) -> Tensor:
    """Store a block's keys and values, and return its queries as attention reads them.

    Args:
        q, k, v: [tokens, heads, head_dim], as projected; tokens may be apart in memory, heads and lanes not.
        q_weight, k_weight: [heads * head_dim] of the RMSNorm, or None for both: q and k are normalised already.
        angles: of the block's tokens.
        cache: written in place. Tokens wrap at the end of a slot; in e4m3 they must not, and the block owns every
            tile that it touches: what it leaves of them is zeroed.
        at: int32 [2] on q's device, slot and first token.
        eps: added to the mean square; of no effect without weights.
        implementation: "reference" or "triton"; None picks.

    Returns:
        The rotated query, [tokens, heads, head_dim] in q's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
        KernelUnavailableError: `implementation` cannot run here.
    """
    tokens, heads, head_dim = q.shape
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype:
            raise ValueError(
                f"{name}: expected {list(q.shape)} {q.dtype} like q, not {list(tensor.shape)} {tensor.dtype}"
            )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(2) != 1 or tensor.stride(1) != head_dim:
            raise ValueError(f"{name}: the heads of a token must lie together, strides are {tensor.stride()}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight: expected both, or None for both")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.shape != (heads * head_dim,):
            raise ValueError(f"{name}: expected [{heads * head_dim}], not {list(weight.shape)}")
    if angles.tokens != tokens or angles.pairs != head_dim // 2:
        raise ValueError(
            f"angles: expected {tokens} tokens of {head_dim // 2} pairs, not {angles.tokens} of {angles.pairs}"
        )
    if at.dtype != torch.int32 or at.shape != (2,):
        raise ValueError(f"at: expected int32 [2], not {at.dtype} {list(at.shape)}")
    cache.check("cache", heads, head_dim)
    if tokens > cache.tokens:
        raise ValueError(f"cache: {cache.tokens} tokens cannot take {tokens}")
    chosen = OP.choose(q.device, implementation, refuses=refuses_e4m3(q.device, cache.quantized))
    return _custom_op(q, k, v, q_weight, k_weight, *angles, *cache, at, eps, chosen)


@torch.library.custom_op("liveavatar_kernels::ring_write", mutates_args=("cache_k", "cache_v", "k_scale", "v_scale"))
def _custom_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    time: Tensor,
    space: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    run_tokens: int,
    at: Tensor,
    eps: float,
    implementation: str,
) -> Tensor:
    cache = KeyValueCache(cache_k, cache_v, k_scale, v_scale, run_tokens)
    with on_device(q.device):
        return OP[implementation].run(q, k, v, q_weight, k_weight, Angles(time, space), cache, at, eps=eps)


@_custom_op.register_fake
def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)
