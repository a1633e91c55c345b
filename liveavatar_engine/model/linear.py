"""Linear layers in e4m3: a scale per output channel for weights, a scale per token for activations."""

from __future__ import annotations

from typing import Self

import torch
from liveavatar_kernels.e4m3 import E4M3, Quantized, quantize_rows
from liveavatar_kernels.fp8_linear import fp8_linear, fp8_linear_quantized
from liveavatar_kernels.fp8_quantize import fp8_quantize
from torch import Tensor, nn

Activation = Tensor | Quantized
"""Input of a linear layer: [tokens, dim] in the model's dtype, or quantised for layers in e4m3."""


class Fp8Linear(nn.Module):
    """act(x W^T + b) with W and x in e4m3; bias and result in the model's dtype.

    Attributes:
        weight: e4m3 [out, in].
        weight_scale: float32 [out].
        bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantise a weight [out, in] row by row."""
        super().__init__()
        values, scale = quantize_rows(weight)
        self.dtype = weight.dtype
        self.weight = nn.Parameter(values, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, *linears: nn.Linear) -> Self:
        """One layer that computes several of the same input, their outputs side by side."""
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        assert len(biases) in (0, len(linears))
        weights: list[Tensor] = [linear.weight for linear in linears]
        return cls(torch.cat(weights), torch.cat(biases) if biases else None)

    def forward(self, x: Activation) -> Tensor:
        """[..., in] -> [..., out]."""
        if isinstance(x, Quantized):
            return fp8_linear(x, self.weight, self.weight_scale, self.bias, dtype=self.dtype)
        return self(fp8_quantize(x.reshape(-1, x.shape[-1]))).view(*x.shape[:-1], -1)

    def gelu(self, x: Activation) -> Tensor:
        """GELU(tanh) of the result: [tokens, in] -> [tokens, out]."""
        return fp8_linear(_quantized(x), self.weight, self.weight_scale, self.bias, gelu=True, dtype=self.dtype)

    def gelu_quantized(self, x: Activation) -> Quantized:
        """GELU(tanh) of the result, for a next layer in e4m3: [tokens, in] -> [tokens, out]."""
        return fp8_linear_quantized(_quantized(x), self.weight, self.weight_scale, self.bias, gelu=True)


def input_dtype(layer: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """What a norm in front of `layer` should make: e4m3 where the layer reads it, else the model's `dtype`."""
    return E4M3 if isinstance(layer, Fp8Linear) else dtype


def _quantized(x: Activation) -> Quantized:
    return x if isinstance(x, Quantized) else fp8_quantize(x)
