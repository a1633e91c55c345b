"""Sum, norm and SiLU in plain PyTorch: the float32 truth that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NORM_EPS = 1e-12
"""The smallest norm that is divided by."""


def channel_norm(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    total: Tensor | None,
    values: Tensor,
) -> None:
    """As the op; `total` is written unless it is None."""
    wide = x if x.dtype == torch.float64 else x.float()
    for added in (bias, residual):
        if added is not None:
            wide = wide + added.to(wide.dtype)
    wide = wide.to(x.dtype).to(wide.dtype)
    norm = wide.square().sum(-1, keepdim=True).sqrt_().clamp_min_(NORM_EPS)
    normed = wide / norm * (x.shape[-1] ** 0.5 * gamma.to(wide.dtype))
    if total is not None:
        total.copy_(wide)
    values.copy_(F.silu(normed, inplace=True) if silu else normed)
