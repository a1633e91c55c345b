"""Ring attention in plain PyTorch: the float32 truth that every kernel is compared with."""

import torch
from torch import Tensor

from ..rotation import rotate_pairs

_LOGIT_BYTES = 1 << 28


def ring_attention(
    q: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    *,
    fixed_tokens: int,
    shift_cos: Tensor,
    shift_sin: Tensor,
) -> Tensor:
    """softmax(q [ring | fixed | R(s) moved]^T / sqrt(head_dim)) [ring | fixed | moved], with R(s) applied to the query.

    The sink is `[fixed | moved]`. Its moved keys are stored rotated at their base positions and stand at a position
    that is a uniform temporal shift s further: q . R(s) k = (R(-s) q) . k, so the query is rotated back once and no
    key is touched.

    Args:
        q: [tokens, heads, head_dim], rotated at the block's positions.
        ring_k, ring_v: [valid, heads, head_dim], the valid part of the ring, keys rotated; any order.
        sink_k, sink_v: [sink_tokens, heads, head_dim], keys rotated.
        fixed_tokens: how many leading sink tokens do not move.
        shift_cos, shift_sin: [temporal_pairs], cosines and sines of s times each temporal frequency.

    Returns:
        [tokens, heads, head_dim] in q's dtype; arithmetic in float32 (float64 for float64 input).
    """
    moved_q = rotate_pairs(q, shift_cos[None], -shift_sin[None])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = [_heads_first(k, wide).transpose(1, 2) for k in (ring_k, sink_k[:fixed_tokens], sink_k[fixed_tokens:])]
    ring_values, sink_values = _heads_first(ring_v, wide), _heads_first(sink_v, wide)
    scale = q.shape[-1] ** -0.5
    q, moved_q = _heads_first(q, wide) * scale, _heads_first(moved_q, wide) * scale

    heads, tokens, _ = q.shape
    ring_tokens, key_count = ring_values.shape[1], ring_values.shape[1] + sink_values.shape[1]
    rows = max(1, _LOGIT_BYTES // (heads * key_count * wide.itemsize))
    out = torch.empty_like(q)
    for start in range(0, tokens, rows):
        tile = slice(start, start + rows)
        queries = (q[:, tile], q[:, tile], moved_q[:, tile])
        weights = torch.cat([a @ b for a, b in zip(queries, keys, strict=True)], dim=-1).softmax(dim=-1)
        out[:, tile] = weights[..., :ring_tokens] @ ring_values + weights[..., ring_tokens:] @ sink_values
    return out.transpose(0, 1).to(ring_v.dtype)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.transpose(0, 1).to(dtype)
