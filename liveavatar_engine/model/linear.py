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

    Made empty, to be filled by `quantize` or by copying what has been quantised before.

    Attributes:
        dtype: of the result.
        weight: e4m3 [out, in].
        weight_scale: float32 [out].
        bias: [out] in `dtype`, or None.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.dtype = dtype

        def empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = empty(out_features, in_features, dtype=E4M3)
        self.weight_scale = empty(out_features, dtype=torch.float32)
        self.bias = empty(out_features, dtype=dtype) if bias else None

    @classmethod
    def of(cls, *linears: nn.Linear) -> Self:
        """An empty layer in place of several with the same input, on their device: their outputs side by side."""
        first, outputs = linears[0], sum(linear.out_features for linear in linears)
        assert len({linear.bias is None for linear in linears}) == 1
        return cls(first.in_features, outputs, first.bias is not None, first.weight.dtype, first.weight.device)

    def quantize(self, first_row: int, weight: Tensor) -> None:
        """Fill rows of the weight from `first_row` on: [rows, in] in any dtype, each row with a scale of its own."""
        rows = slice(first_row, first_row + len(weight))
        values, scale = quantize_rows(weight)
        self.weight[rows], self.weight_scale[rows] = values, scale

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
