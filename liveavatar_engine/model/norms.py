"""Norms of whole rows, computed in float32 whatever the model's dtype; those of the stream are in `residual`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """RMSNorm over the last axis; where an op includes it, the op reads the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim] in x's dtype."""
        wide = at_least_float32(x)
        return F.rms_norm(wide, x.shape[-1:], self.weight.to(wide.dtype), self.eps).to(x.dtype)


class AffineNorm(nn.Module):
    """Weight and bias of a LayerNorm, which is part of the pass that adds a branch to the stream."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))


def at_least_float32(x: Tensor) -> Tensor:
    """`x` widened to float32; float64 stays, for computations that check float32 ones."""
    return x if x.dtype == torch.float64 else x.float()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32; float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
