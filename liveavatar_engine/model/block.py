"""The adaLN transformer block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .attention import CachedCrossAttention, KeyValue, RingSelfAttention, RingView
from .norms import AffineLayerNorm, at_least_float32, modulated_norm
from .rope import Rotation


class TransformerBlock(nn.Module):
    """Self-attention, text cross-attention and FFN; residual arithmetic in float32, stored in the model's dtype.

    The six modulation vectors are, in order, shift, scale and gate of self-attention, then of the FFN.
    """

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.self_attn = RingSelfAttention(dim, heads, eps)
        self.norm3 = AffineLayerNorm(dim, eps)
        self.cross_attn = CachedCrossAttention(dim, heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    def forward(
        self, x: Tensor, modulation: Tensor, text: KeyValue, ring: KeyValue, sink: KeyValue, view: RingView
    ) -> Tensor:
        """A block's tokens at one timestep: [tokens, dim] -> [tokens, dim]; `modulation` is float32 [6, dim]."""
        return self._residuals(x, modulation, text, lambda normed: self.self_attn(normed, ring, sink, view))

    def prefill(self, x: Tensor, modulation: Tensor, text: KeyValue, sink: KeyValue, rotation: Rotation) -> Tensor:
        """Sink tokens, which fill `sink`: [sink_tokens, dim] -> [sink_tokens, dim]."""
        return self._residuals(x, modulation, text, lambda normed: self.self_attn.prefill(normed, sink, rotation))

    def _residuals(self, x: Tensor, modulation: Tensor, text: KeyValue, attend: Callable[[Tensor], Tensor]) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation
        dtype, stream = x.dtype, at_least_float32(x)
        stream = stream + gate_attn * attend(modulated_norm(stream, shift_attn, scale_attn, self.eps, dtype))
        stream = stream + self.cross_attn(self.norm3(stream, dtype), text)
        stream = stream + gate_ffn * self.ffn(modulated_norm(stream, shift_ffn, scale_ffn, self.eps, dtype))
        return stream.to(dtype)
