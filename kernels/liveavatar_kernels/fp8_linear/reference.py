"""The FP8 linear layer in plain PyTorch: the float32 truth that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .tiling import ROW_MAX_COLUMNS

_WEIGHT_BYTES = 1 << 26


def fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    row_max: bool,
) -> tuple[Tensor, Tensor]:
    """As the custom op; products of e4m3 are exact in float32. Weights are widened a few rows at a time."""
    wide = x.float()
    out = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
    rows = max(1, _WEIGHT_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        y = wide @ weight[part].float().T * x_scale[:, None] * weight_scale[part]
        if bias is not None:
            y += bias[part].float()
        out[:, part] = F.gelu(y, approximate="tanh") if gelu else y
    return out, row_maxima(out) if row_max else x.new_empty((x.shape[0], 0), dtype=torch.float32)


def row_maxima(y: Tensor) -> Tensor:
    """[tokens, out] -> float32 [tokens, tiles], the largest magnitude of every ROW_MAX_COLUMNS of a row."""
    padded = F.pad(y.float().abs(), (0, -y.shape[1] % ROW_MAX_COLUMNS))
    return padded.unflatten(1, (-1, ROW_MAX_COLUMNS)).amax(-1)
