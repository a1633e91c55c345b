"""Modulated norm in plain PyTorch: the float32 truth that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..e4m3 import E4M3, quantize_rows


def modulated_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    ends: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the op: residual, values and their scales; arithmetic in float32, or float64 for float64 x."""
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    group = _group_of_token(x, ends, groups)

    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(arithmetic)

    def by_token(rows: Tensor) -> Tensor:
        return wide(rows if len(rows) == 1 else rows[group])

    residual = x
    if branch is not None:
        added = wide(branch) if gate is None else by_token(gate) * wide(branch)
        residual = (wide(x) + added).to(residual_dtype, memory_format=torch.contiguous_format)
    weight, bias = (None if tensor is None else wide(tensor) for tensor in (weight, bias))
    values = F.layer_norm(wide(residual), x.shape[-1:], weight, bias, eps)
    if scale is not None:
        values = values * (1 + by_token(scale))
    if shift is not None:
        values = values + by_token(shift)
    if dtype == E4M3:
        return residual, *quantize_rows(values)
    return residual, values.to(dtype), None


def _group_of_token(x: Tensor, ends: Tensor | None, groups: int) -> Tensor:
    """Group of every token, [tokens]."""
    tokens = torch.arange(len(x), dtype=torch.int32, device=x.device)
    if ends is None:
        return tokens // max(1, len(x) // groups)
    return torch.searchsorted(ends[:-1], tokens, right=True)
