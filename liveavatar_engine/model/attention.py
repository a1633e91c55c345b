"""Attention modules: self-attention over ring and sink, cross-attention over cached keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from liveavatar_kernels.cache import KeyValueCache, Window
from liveavatar_kernels.cross_attention import cross_attention
from liveavatar_kernels.ring_attention import ring_attention
from liveavatar_kernels.ring_write import ring_write
from liveavatar_kernels.rotation import Angles
from torch import Tensor, nn

from .linear import Activation, Fp8Linear, input_dtype
from .norms import RMSNorm
from .sequence import WHOLE, HeadRows, TokenSplit


@dataclass(frozen=True)
class KeyValue:
    """Keys and values that are computed once and read in every step: [..., rows, heads, head_dim] each."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class LayerCaches:
    """What one layer reads and writes, in every slot of an arena.

    Attributes:
        ring: takes the keys and values of the tokens at hand.
        sink: read beside it.
        text: of the prompts, [slots, text_len, heads, head_dim].
    """

    ring: KeyValueCache
    sink: KeyValueCache
    text: KeyValue


@dataclass(frozen=True)
class RingView:
    """Where a block writes its keys and values, and what it sees; tensors that kernels read on the device.

    Attributes:
        at: int32 [2], slot of the ring and first token.
        angles: of the block's tokens.
        window: what its queries see of ring and sink.
    """

    at: Tensor
    angles: Angles
    window: Window


@dataclass(frozen=True)
class StepView:
    """Where the groups of a call stand: equal runs of tokens, each one block at one timestep.

    Attributes:
        rings: one entry per group.
        text: int32 [groups, 3], slot of the prompt, its tokens, and the padding tokens behind them.
        split: of the call's tokens over the ranks that share it.
    """

    rings: tuple[RingView, ...]
    text: Tensor
    split: TokenSplit = WHOLE


class Projections(nn.Module):
    """Query, key, value and output projections with RMSNorm of q and k over all heads together."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def split(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., heads, head_dim]."""
        return x.unflatten(-1, (self.heads, -1))

    def merge(self, x: Tensor) -> Tensor:
        """[..., heads, head_dim] -> output projection [..., dim]."""
        return self.o(x.flatten(-2))


class RingSelfAttention(Projections):
    """A block's tokens attend to everything in the ring of their timestep, themselves included, and to the sink.

    `qkv` stands in for `q`, `k` and `v` once `fuse` has made one layer of them.
    """

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__(dim, heads, eps)
        self.qkv: Fp8Linear | None = None

    def fuse(self) -> None:
        """Replace the three projections by one layer in e4m3."""
        self.qkv = Fp8Linear.of(self.q, self.k, self.v)
        del self.q, self.k, self.v

    def input_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What a norm in front should make: e4m3 where all three projections read it, else the model's `dtype`."""
        return dtype if self.qkv is None else input_dtype(self.qkv, dtype)

    def forward(self, x: Activation, caches: LayerCaches, view: StepView) -> Tensor:
        """[tokens, dim] -> [tokens, dim], this rank's tokens of the view's groups.

        The keys and values of each group are written to the ring first; groups do not see each other.
        """
        projected = (self.q(x), self.k(x), self.v(x)) if self.qkv is None else self.qkv(x).chunk(3, dim=-1)
        q, k, v = (self.split(part) for part in projected)
        rows = view.split.to_heads(q, k, v, self.norm_q, self.norm_k)
        by_group = zip(*(part.chunk(len(view.rings)) for part in rows[:3]), view.rings, strict=True)
        attended = [
            self._attend(HeadRows(q, k, v, rows.q_weight, rows.k_weight), caches, ring) for q, k, v, ring in by_group
        ]
        return self.merge(view.split.to_tokens(attended[0] if len(attended) == 1 else torch.cat(attended)))

    def _attend(self, rows: HeadRows, caches: LayerCaches, view: RingView) -> Tensor:
        q = ring_write(*rows, view.angles, caches.ring, view.at, eps=self.norm_q.eps)
        return ring_attention(q, caches.ring, caches.sink, view.window)


class CachedCrossAttention(Projections):
    """Cross-attention whose keys and values are computed once and read in every step."""

    def key_value(self, context: Tensor) -> KeyValue:
        """[..., tokens, dim] -> keys and values [..., tokens, heads, head_dim]."""
        return KeyValue(self.split(self.norm_k(self.k(context))), self.split(self.v(context)))

    def forward(self, x: Activation, context: KeyValue, view: Tensor) -> Tensor:
        """[tokens, dim] -> [tokens, dim].

        `context` is [slots, rows, heads, head_dim]. `view`, int32 [groups, 3], names slot, tokens and padding tokens of
        what each group of tokens reads.
        """
        q = self.split(self.q(x)).unflatten(0, (len(view), -1))
        attended = cross_attention(q, self.norm_q.weight, context.k, context.v, view, eps=self.norm_q.eps)
        return self.merge(attended.flatten(0, 1))
