"""Shapes of fp8_linear, declared once for tests, benchmarks and warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..e4m3 import Quantized, quantize_rows
from ..model_sizes import ModelSizes

_OUTLIER = 100.0


@dataclass(frozen=True)
class Case:
    """A layer and the tokens it takes.

    Attributes:
        quantized: for `fp8_linear_quantized`.
        outliers: make some tokens and some channels, of x and of the result, 100 times larger; weights of large
            channels of x are as much smaller, so that every channel matters.
    """

    name: str
    tokens: int
    in_features: int
    out_features: int
    gelu: bool = False
    bias: bool = True
    quantized: bool = False
    outliers: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.in_features * self.out_features

    @property
    def bytes(self) -> int:
        """Least traffic: operands at one byte an element, the result at one or two, scales, and a bias of two."""
        scales = self.tokens * (2 if self.quantized else 1) + self.out_features
        return (
            (self.tokens + self.out_features) * self.in_features
            + self.tokens * self.out_features * (1 if self.quantized else 2)
            + 4 * scales
            + (2 * self.out_features if self.bias else 0)
        )

    def operands(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
        """x [tokens, in] and the weight [out, in] before they are quantised, float32."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.tokens, self.in_features, generator=generator)
        weight = torch.randn(self.out_features, self.in_features, generator=generator) * self.in_features**-0.5
        if self.outliers:
            x[::7] *= _OUTLIER
            x[:, ::7] *= _OUTLIER
            weight[:, ::7] /= _OUTLIER
            weight[::7] *= _OUTLIER
        return x.to(device), weight.to(device)

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of the op, the bias in `dtype`; those of a quantised result lack its dtype."""
        x, weight = self.operands(device, seed)
        bias = torch.randn(self.out_features, generator=torch.Generator().manual_seed(seed + 1))
        values, scales = quantize_rows(weight)
        arguments = {
            "x": Quantized(*quantize_rows(x)),
            "weight": values,
            "weight_scale": scales,
            "bias": bias.to(device, dtype) if self.bias else None,
            "gelu": self.gelu,
        }
        return arguments if self.quantized else {**arguments, "dtype": dtype}


def model_cases(sizes: ModelSizes) -> tuple[Case, ...]:
    """The large products of a layer, at every picture size: FFN-up hands e4m3 to FFN-down."""
    return tuple(
        case
        for tokens in sizes.block_tokens
        for case in (
            Case(f"qkv, {tokens} tokens", tokens, sizes.dim, 3 * sizes.dim),
            Case(f"attention output, {tokens} tokens", tokens, sizes.dim, sizes.dim),
            Case(f"ffn up, {tokens} tokens", tokens, sizes.dim, sizes.ffn_dim, gelu=True, quantized=True),
            Case(f"ffn down, {tokens} tokens", tokens, sizes.ffn_dim, sizes.dim),
        )
    )


CASES = (
    Case("square", 64, 128, 128),
    Case("one token", 1, 32, 16),
    Case("awkward lengths", 63, 272, 200, gelu=True),
    Case("no bias", 130, 64, 72, bias=False),
    Case("features that are no multiple of 16", 33, 50, 37, gelu=True),
    Case("long sum", 17, 1040, 24),
    Case("tokens and channels with outliers", 130, 256, 136, outliers=True),
    Case("quantised", 63, 48, 200, gelu=True, quantized=True),
    Case("quantised, no multiple of 16", 20, 40, 131, bias=False, quantized=True),
)
