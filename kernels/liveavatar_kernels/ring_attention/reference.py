"""Ring attention in plain PyTorch: the float32 truth that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import MOVED, KeyValueCache, Window
from ..e4m3 import KV_TILE
from ..rotation import rotate_pairs

_LOGIT_BYTES = 1 << 28


def ring_attention(q: Tensor, ring: KeyValueCache, sink: KeyValueCache, window: Window) -> Tensor:
    """As the op; arithmetic in float32, or float64 for float64 input. Reads the window's integers on the host."""
    cos, sin = window.shift
    moved_q = rotate_pairs(q, cos[None], -sin[None])
    groups = window.segments.shape[0]
    out = torch.empty_like(q)
    for group, heads in enumerate(torch.arange(q.shape[1]).chunk(groups)):
        chosen = slice(int(heads[0]), int(heads[-1]) + 1)
        segments = gather(ring, sink, window, group, chosen)
        queries = [moved_q if row == MOVED else q for row, _, _ in segments]
        out[:, chosen] = _attend(
            [_heads_first(x[:, chosen], q.dtype) for x in queries],
            [_heads_first(k, q.dtype).transpose(1, 2) for _, k, _ in segments],
            [_heads_first(v, q.dtype) for _, _, v in segments],
        ).to(q.dtype)
    return out


def gather(
    ring: KeyValueCache, sink: KeyValueCache, window: Window, group: int, heads: slice
) -> list[tuple[int, Tensor, Tensor]]:
    """Row, keys and values, dequantised [tokens, heads, head_dim], of each segment that is not empty."""
    ring_slot, sink_slot = window.slots.tolist()
    found = []
    for row, (start, length) in enumerate(window.segments[group].tolist()):
        if length:
            cache, slot = (ring, ring_slot) if row < 2 else (sink, sink_slot)
            found.append((row, *_segment(cache, slot, start, length, heads)))
    return found


def _segment(cache: KeyValueCache, slot: int, start: int, length: int, heads: slice) -> tuple[Tensor, Tensor]:
    k = cache.k[slot, start : start + length, heads]
    if not cache.quantized:
        return k, cache.v[slot, start : start + length, heads]
    assert cache.k_scale is not None
    assert cache.v_scale is not None
    tokens = torch.arange(start, start + length, device=k.device)
    tokens = tokens[tokens % cache.run_stride < cache.run_length]
    k_scale, v_scale = cache.k_scale[slot, heads][:, tokens], cache.v_scale[slot, heads][:, tokens // KV_TILE]
    v = cache.v[slot, heads][:, :, tokens].float().permute(2, 0, 1)
    return cache.k[slot, tokens, heads].float() * k_scale.T[..., None], v * v_scale.T[..., None]


def _attend(queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """softmax([q k for each segment]) [v of each segment]: [tokens, heads, head_dim], a tile of queries at a time."""
    heads, tokens, head_dim = queries[0].shape
    scale = head_dim**-0.5
    lengths = [v.shape[1] for v in values]
    rows = max(1, _LOGIT_BYTES // (heads * sum(lengths) * keys[0].itemsize))
    out = torch.empty_like(queries[0])
    for start in range(0, tokens, rows):
        tile = slice(start, start + rows)
        logits = [(q[:, tile] * scale) @ k for q, k in zip(queries, keys, strict=True)]
        weights = torch.cat(logits, dim=-1).softmax(dim=-1).split(lengths, dim=-1)
        out[:, tile] = sum((w @ v for w, v in zip(weights, values, strict=True)), start=torch.zeros(()))
    return out.transpose(0, 1)


def _heads_first(x: Tensor, like: torch.dtype) -> Tensor:
    """[tokens, heads, head_dim] -> [heads, tokens, head_dim], in float32, float64 for float64."""
    return x.transpose(0, 1).to(torch.float64 if like == torch.float64 else torch.float32)
