"""Normalisations, computed in float32 whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Weight of an RMSNorm over the whole dim; the norm itself is part of the ops that use it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim] in x's dtype."""
        wide = at_least_float32(x)
        return F.rms_norm(wide, x.shape[-1:], self.weight.to(wide.dtype), self.eps).to(x.dtype)


class AffineLayerNorm(nn.Module):
    """LayerNorm with weight and bias over the last axis."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., dim] -> [..., dim] in `dtype`."""
        wide = at_least_float32(x)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, x.shape[-1:], weight, bias, self.eps).to(dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift without affine weights: [..., dim] -> [..., dim] in `dtype`."""
    wide = at_least_float32(x)
    return (F.layer_norm(wide, x.shape[-1:], eps=eps) * (1 + scale) + shift).to(dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` widened to float32; float64 stays, for computations that check float32 ones."""
    return x if x.dtype == torch.float64 else x.float()
