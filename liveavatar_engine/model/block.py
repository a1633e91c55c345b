"""The adaLN transformer block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import CachedCrossAttention, LayerCaches, RingSelfAttention, StepView
from .linear import Activation, Fp8Linear, input_dtype
from .norms import AffineNorm, wide_dtype
from .residual import Residual


class FeedForward(nn.Sequential):
    """Linear, GELU(tanh), Linear."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    def forward(self, x: Any) -> Tensor:
        """[tokens, dim] -> [tokens, dim]; what lies between two layers in e4m3 is quantised by the first."""
        up, _, down = self
        if not isinstance(up, Fp8Linear):
            return super().forward(x)
        return down(up.gelu_quantized(x) if isinstance(down, Fp8Linear) else up.gelu(x))


class TransformerBlock(nn.Module):
    """Self-attention, text cross-attention and FFN; residual arithmetic in float32, stored in the model's dtype.

    The six modulation vectors are, in order, shift, scale and gate of self-attention, then of the FFN.
    """

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.self_attn = RingSelfAttention(dim, heads, eps)
        self.norm3 = AffineNorm(dim)
        self.cross_attn = CachedCrossAttention(dim, heads, eps)
        self.ffn = FeedForward(dim, ffn_dim)

    def forward(self, stream: Residual, modulation: Tensor, caches: LayerCaches, view: StepView) -> Residual:
        """This rank's tokens of one or several groups, [tokens, dim]; `modulation` is float32 [6, groups, dim].

        The stream that is returned waits for the FFN's branch, to be rounded to the model's dtype.
        """
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation
        dtype = self.norm3.weight.dtype
        wide = wide_dtype(dtype)
        x: Activation
        stream, x = stream.normed(
            self.eps, self.self_attn.input_dtype(dtype), dtype, shift=shift_attn, scale=scale_attn
        )
        stream = stream.plus(self.self_attn(x, caches, view), gate_attn)
        stream, x = stream.normed(
            self.eps,
            input_dtype(self.cross_attn.q, dtype),
            wide,
            weight=self.norm3.weight,
            bias=self.norm3.bias,
        )
        stream = stream.plus(self.cross_attn(x, caches.text, view.text))
        stream, x = stream.normed(self.eps, input_dtype(self.ffn[0], dtype), wide, shift=shift_ffn, scale=scale_ffn)
        return stream.plus(self.ffn(x), gate_ffn)
