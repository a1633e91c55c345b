"""Attention modules: self-attention over ring and sink, cross-attention over cached keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from liveavatar_kernels.ring_attention import ring_attention
from liveavatar_kernels.ring_write import ring_write
from liveavatar_kernels.rotation import rotate_pairs
from torch import Tensor, nn
from torch.nn import functional as F

from .norms import RMSNorm
from .rope import Rotation


@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one layer: [..., tokens, heads, head_dim] each."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class RingView:
    """Where a block stands in the ring of its timestep, and where the sink stands relative to it.

    Attributes:
        start: ring slot of the block's first token.
        valid: ring tokens that hold keys once the block's own are written.
        rotation: angles of the block's tokens.
        shift: angles [temporal_pairs] by which the reference image's keys have moved since they were stored.
        fixed_tokens: leading sink tokens that do not move.
    """

    start: int
    valid: int
    rotation: Rotation
    shift: Rotation
    fixed_tokens: int


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
    """A block's tokens attend to everything in the ring of their timestep, themselves included, and to the sink."""

    def forward(self, x: Tensor, ring: KeyValue, sink: KeyValue, view: RingView) -> Tensor:
        """[tokens, dim] -> [tokens, dim]; the block's keys and values are written to `ring` first."""
        q, k, v = (self.split(projection(x)) for projection in (self.q, self.k, self.v))
        q = ring_write(
            q,
            k,
            v,
            self.norm_q.weight,
            self.norm_k.weight,
            view.rotation.cos,
            view.rotation.sin,
            ring.k,
            ring.v,
            start=view.start,
            eps=self.norm_q.eps,
        )
        attended = ring_attention(
            q,
            ring.k[: view.valid],
            ring.v[: view.valid],
            sink.k,
            sink.v,
            fixed_tokens=view.fixed_tokens,
            shift_cos=view.shift.cos,
            shift_sin=view.shift.sin,
        )
        return self.merge(attended.to(x.dtype))

    def prefill(self, x: Tensor, sink: KeyValue, rotation: Rotation) -> Tensor:
        """Sink tokens attend among themselves, and their rotated keys and values are stored in `sink`."""
        q, k = (
            rotate_pairs(self.split(norm(projection(x))), rotation.cos, rotation.sin)
            for norm, projection in ((self.norm_q, self.q), (self.norm_k, self.k))
        )
        v = self.split(self.v(x))
        sink.k.copy_(k)
        sink.v.copy_(v)
        return self.merge(attend(q, k, v))


class CachedCrossAttention(Projections):
    """Cross-attention whose keys and values are computed once and read in every step."""

    def key_value(self, context: Tensor) -> KeyValue:
        """[..., tokens, dim] -> keys and values [..., tokens, heads, head_dim]."""
        return KeyValue(self.split(self.norm_k(self.k(context))), self.split(self.v(context)))

    def forward(self, x: Tensor, context: KeyValue) -> Tensor:
        """[..., tokens, dim] -> [..., tokens, dim]; leading axes of `x` and `context` match."""
        q = self.split(self.norm_q(self.q(x)))
        return self.merge(attend(q, context.k, context.v))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention of [..., queries, heads, head_dim] to [..., keys, heads, head_dim]."""
    q, k, v = (x.transpose(-3, -2).contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2)
