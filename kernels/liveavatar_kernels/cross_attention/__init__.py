"""Attention of a block's queries to keys and values that were computed before: of a prompt, or of a frame's audio.

softmax(RMSNorm(q) [k | padding]^T / sqrt(head_dim) + [0 | log(count)]) [v | padding], the norm over all heads together.
The tokens that pad a text all have the same key and value: one key that counts for all of them gives the same result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import ANYWHERE, Implementation, Op, never_absent, on_device, triton_absent
from . import library, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TRITON_HEAD_DIMS = (32, 64, 128)


def _triton(*arguments: Any) -> Tensor:
    from . import kernel

    return kernel.cross_attention(*arguments)


OP = Op(
    "cross_attention",
    (
        Implementation("triton", _triton, triton_absent, automatic=("cuda",)),
        Implementation("reference", reference.cross_attention, never_absent, automatic=ANYWHERE),
        *library.IMPLEMENTATIONS,
    ),
)


def cross_attention(
    q: Tensor,
    norm_weight: Tensor,
    k: Tensor,
    v: Tensor,
    view: Tensor,
    *,
    eps: float,
    implementation: str | None = None,
) -> Tensor:
    """Attend to the keys and values of a slot, another one for each group of queries.

    Group g sees rows 0 to n - 1 of slot s, where (s, n, p) is row g of `view`, and if p > 0 also row n, which counts p
    times. No other row is used, whatever it holds. Arithmetic in float32, or float64 for float64 q; the normalised
    query is rounded to q's dtype.

    Args:
        q: [groups, tokens, heads, head_dim], as projected; groups and tokens may be apart in memory, heads and lanes
            not. head_dim is 32, 64 or 128 in Triton.
        norm_weight: [heads * head_dim], contiguous, of the RMSNorm of q.
        k, v: [slots, rows, heads, head_dim] in q's dtype, keys as normalised; slots and rows may be apart, heads and
            lanes not.
        view: int32 [groups, 3] on q's device, contiguous: slot, number of tokens n, count of padding tokens p, with
            n + (p > 0) from 1 to `rows`.
        eps: added to the mean square.
        implementation: "triton", "reference" or the library's, "sdpa" (attends to all padding; reads `view` on the
            host, and is never picked); None picks.

    Returns:
        [groups, tokens, heads, head_dim], contiguous, in q's dtype. The same bits for the same arguments.

    Raises:
        ValueError: shapes, strides or dtypes do not fit.
        KernelUnavailableError: `implementation` cannot run here.
    """
    if q.ndim != 4 or q.dtype not in _DTYPES:
        raise ValueError(f"q: expected floating-point [groups, tokens, heads, head_dim], not {q.dtype} {list(q.shape)}")
    groups, _, heads, head_dim = q.shape
    if norm_weight.shape != (heads * head_dim,) or not norm_weight.is_contiguous():
        raise ValueError(f"norm_weight: expected contiguous [{heads * head_dim}], not {list(norm_weight.shape)}")
    if k.ndim != 4 or k.shape[2:] != (heads, head_dim) or k.dtype != q.dtype:
        raise ValueError(f"k: expected {q.dtype} [slots, rows, {heads}, {head_dim}], not {k.dtype} {list(k.shape)}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v: expected {k.dtype} {list(k.shape)} like k, not {v.dtype} {list(v.shape)}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(3) != 1 or (heads > 1 and tensor.stride(2) != head_dim):
            raise ValueError(f"{name}: the heads of a token must lie together, strides are {tensor.stride()}")
    if view.dtype != torch.int32 or view.shape != (groups, 3) or not view.is_contiguous():
        raise ValueError(f"view: expected contiguous int32 [{groups}, 3], not {view.dtype} {list(view.shape)}")

    def refuses(name: str) -> str | None:
        if name != "triton":
            return None
        if q.dtype == torch.float64:
            return "no float64"
        return None if head_dim in _TRITON_HEAD_DIMS else f"head_dim must be 32, 64 or 128, not {head_dim}"

    chosen = OP.choose(q.device, implementation, refuses=refuses)
    return _custom_op(q, norm_weight, k, v, view, eps, chosen)


@torch.library.custom_op("liveavatar_kernels::cross_attention", mutates_args=())
def _custom_op(
    q: Tensor, norm_weight: Tensor, k: Tensor, v: Tensor, view: Tensor, eps: float, implementation: str
) -> Tensor:
    with on_device(q.device):
        return OP[implementation].run(q, norm_weight, k, v, view, eps)


@_custom_op.register_fake
def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)
