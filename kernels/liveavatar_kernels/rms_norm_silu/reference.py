"""Norm and SiLU in plain PyTorch: the float32 truth that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NORM_EPS = 1e-12
"""The smallest norm that is divided by."""


def rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """As the op."""
    wide = x if x.dtype == torch.float64 else x.float()
    norm = wide.square().sum(-1, keepdim=True).sqrt().clamp_min(NORM_EPS)
    return F.silu(wide / norm * (x.shape[-1] ** 0.5 * gamma.to(wide.dtype))).to(x.dtype)
