"""Attention modules: self-attention over ring and sink, cross-attention over cached keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from liveavatar_kernels.cache import KeyValueCache, Window
from liveavatar_kernels.ring_attention import ring_attention
from liveavatar_kernels.ring_write import ring_write
from liveavatar_kernels.rotation import Angles
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Activation, Fp8Linear, input_dtype
from .norms import RMSNorm


@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one layer: [..., tokens, heads, head_dim] each."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class RingView:
    """Where a block writes its keys and values, and what it sees; tensors that kernels read on the device.

    Attributes:
        at: int32 [2], slot of the session and first token.
        angles: of the block's tokens.
        window: what its queries see of ring and sink.
    """

    at: Tensor
    angles: Angles
    window: Window


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

    def forward(self, x: Activation, ring: KeyValueCache, sink: KeyValueCache, view: RingView) -> Tensor:
        """[tokens, dim] -> [tokens, dim]; the block's keys and values are written to `ring` first."""
        projected = (self.q(x), self.k(x), self.v(x)) if self.qkv is None else self.qkv(x).chunk(3, dim=-1)
        q, k, v = (self.split(part) for part in projected)
        weights = self.norm_q.weight, self.norm_k.weight
        q = ring_write(q, k, v, *weights, view.angles, ring, view.at, eps=self.norm_q.eps)
        return self.merge(ring_attention(q, ring, sink, view.window))


class CachedCrossAttention(Projections):
    """Cross-attention whose keys and values are computed once and read in every step."""

    def key_value(self, context: Tensor) -> KeyValue:
        """[..., tokens, dim] -> keys and values [..., tokens, heads, head_dim]."""
        return KeyValue(self.split(self.norm_k(self.k(context))), self.split(self.v(context)))

    def forward(self, x: Activation, context: KeyValue) -> Tensor:
        """[tokens, dim] -> [tokens, dim].

        `context` is [keys, heads, head_dim] for all tokens, or [frames, keys, heads, head_dim], where each frame's
        tokens read its own.
        """
        q = self.split(self.norm_q(self.q(x)))
        if context.k.ndim == q.ndim:
            return self.merge(attend(q, context.k, context.v))
        by_frame = q.unflatten(0, (len(context.k), -1))
        return self.merge(attend(by_frame, context.k, context.v).flatten(0, 1))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention of [..., queries, heads, head_dim] to [..., keys, heads, head_dim]."""
    q, k, v = (x.transpose(-3, -2).contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2)
