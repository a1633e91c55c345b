"""Attention over an e4m3 cache in plain PyTorch, rounding where the kernel rounds: q, and p tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import MOVED, KeyValueCache, Window
from ..e4m3 import KV_TILE, quantize_rows, to_e4m3
from ..rotation import rotate_pairs

LOG2_E = 1.4426950408889634
P_EXPONENT = 8.0
"""Weights are multiplied by 2 to this before they become e4m3: the largest is 1, and e4m3 ends at 448."""


def ring_attention(q: Tensor, ring: KeyValueCache, sink: KeyValueCache, window: Window) -> Tensor:
    """As the op, for e4m3 caches. Reads the window's integers on the host."""
    cos, sin = window.shift
    wide = q.float()
    moved = rotate_pairs(wide, cos[None], -sin[None])
    slots = window.slots.tolist()
    groups = window.segments.shape[0]
    out = torch.empty_like(q)
    for heads, segments in zip(torch.arange(q.shape[1]).chunk(groups), window.segments.tolist(), strict=True):
        chosen = slice(int(heads[0]), int(heads[-1]) + 1)
        state = _OnlineSoftmax(q[:, chosen])
        for row, (start, length) in enumerate(segments):
            cache, slot = (ring, slots[0]) if row < 2 else (sink, slots[1])
            query, query_scale = quantize_rows((moved if row == MOVED else wide)[:, chosen])
            for tile in range(start // KV_TILE, -(-(start + length) // KV_TILE) if length else 0):
                tokens = torch.arange(tile * KV_TILE, (tile + 1) * KV_TILE, device=q.device)
                seen = (tokens >= start) & (tokens < start + length)
                state.add(query, query_scale, _Tile.of(cache, slot, tile, chosen), seen & cache_tokens(cache, tokens))
        out[:, chosen] = state.result().to(q.dtype)
    return out


def cache_tokens(cache: KeyValueCache, tokens: Tensor) -> Tensor:
    """Which of `tokens` are not padding between runs: bool of its shape."""
    return tokens % cache.run_stride < cache.run_length


class _Tile:
    """Keys and values of a tile: [heads, KV_TILE, head_dim] each, and their scales."""

    def __init__(self, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor) -> None:
        self.k, self.v, self.k_scale, self.v_scale = k, v, k_scale, v_scale

    @classmethod
    def of(cls, cache: KeyValueCache, slot: int, tile: int, heads: slice) -> _Tile:
        assert cache.k_scale is not None
        assert cache.v_scale is not None
        here = slice(tile * KV_TILE, (tile + 1) * KV_TILE)
        return cls(
            cache.k[slot, here, heads].float().transpose(0, 1),
            cache.v[slot, heads, :, here].float().transpose(1, 2),
            cache.k_scale[slot, heads, here],
            cache.v_scale[slot, heads, tile],
        )


class _OnlineSoftmax:
    """Running maximum, sum and weighted values of [heads, tokens]; base-2 exponents."""

    def __init__(self, q: Tensor) -> None:
        tokens, heads, head_dim = q.shape
        self._scale = head_dim**-0.5 * LOG2_E
        self._maximum = torch.full((heads, tokens), float("-inf"), device=q.device)
        self._sum = torch.zeros((heads, tokens), device=q.device)
        self._values = torch.zeros((heads, tokens, head_dim), device=q.device)

    def add(self, query: Tensor, query_scale: Tensor, tile: _Tile, seen: Tensor) -> None:
        """Take in a tile; `query` e4m3 [tokens, heads, head_dim], `seen` bool [KV_TILE].

        The values' scale enters the exponent, so that p already carries it and no tile needs a factor of its own.
        """
        logits = query.float().transpose(0, 1) @ tile.k.transpose(1, 2) * tile.k_scale[:, None]
        exponents = logits * (query_scale.T * self._scale)[..., None] + tile.v_scale.log2()[:, None, None]
        exponents = exponents.masked_fill(~seen, float("-inf"))
        maximum = torch.maximum(self._maximum, exponents.amax(-1))
        p = (exponents - maximum[..., None] + P_EXPONENT).exp2()
        decay = (self._maximum - maximum).exp2()
        self._sum = self._sum * decay + p.sum(-1) / tile.v_scale[:, None]
        rounded = to_e4m3(p, torch.ones((), device=p.device)).float()
        values = tile.v.masked_fill(~seen[:, None], 0.0)
        self._values = self._values * decay[..., None] + rounded @ values
        self._maximum = maximum

    def result(self) -> Tensor:
        """[tokens, heads, head_dim], float32."""
        return (self._values / self._sum[..., None]).transpose(0, 1)
