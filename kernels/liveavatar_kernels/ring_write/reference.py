"""Ring write in plain PyTorch: the float32 truth that every kernel is compared with."""

from torch import Tensor
from torch.nn import functional as F

from ..rotation import rotate_pairs


def ring_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    *,
    start: int,
    eps: float,
) -> Tensor:
    """q, k <- R(position) RMSNorm(q), R(position) RMSNorm(k); the ring takes k and v; q is returned.

    The norm runs over the whole dim, all heads together; the rotation over adjacent pairs of each head.

    Args:
        q, k, v: [tokens, heads, head_dim], as projected.
        q_weight, k_weight: [heads * head_dim].
        cos, sin: [tokens, head_dim / 2], the block's angles.
        ring_k, ring_v: [ring_tokens, heads, head_dim], written in place at `start`, wrapping at the end.
        start: first slot, a token index below ring_tokens.
        eps: added to the mean square.

    Returns:
        The rotated query, [tokens, heads, head_dim] in q's dtype.
    """
    q = rotate_pairs(whole_dim_rms_norm(q, q_weight, eps), cos, sin)
    k = rotate_pairs(whole_dim_rms_norm(k, k_weight, eps), cos, sin)
    tokens, ring_tokens = k.shape[0], ring_k.shape[0]
    first = min(tokens, ring_tokens - start)
    for ring, new in ((ring_k, k), (ring_v, v)):
        ring[start : start + first].copy_(new[:first])
        ring[: tokens - first].copy_(new[first:])
    return q


def whole_dim_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last two axes of [..., heads, head_dim] together, in float32 (float64 stays)."""
    flat = x.flatten(-2)
    wide = flat if flat.dtype.itemsize == 8 else flat.float()
    return F.rms_norm(wide, flat.shape[-1:], weight.to(wide.dtype), eps).to(x.dtype).view_as(x)
