"""Shapes of fp8_quantize, declared once for tests, benchmarks and warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..e4m3 import E4M3_MAX
from ..model_sizes import ModelSizes

_GEMM_COLUMNS = 128
"""Columns of a tile of the GEMM that hands row maxima over."""
_OUTLIER = 100.0


@dataclass(frozen=True)
class Case:
    """Rows to quantise.

    Attributes:
        parts: of a row whose largest magnitudes are handed over; 0: none are.
        apart: whether rows are slices of longer ones.
        outliers: make some values 100 times larger, whole tokens and whole channels, and tokens unequally loud.
    """

    form: str
    tokens: int
    dim: int
    parts: int = 0
    apart: bool = False
    outliers: bool = False

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens of {self.dim}, {self.form}"

    @property
    def bytes(self) -> int:
        """Least traffic with x at two bytes an element."""
        return self.tokens * (self.dim * (2 + 1) + 4 * self.parts + 4)

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of the op, random; NaN between rows that are apart."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.tokens, self.dim, generator=generator)
        if self.outliers:
            x *= torch.randn(self.tokens, 1, generator=generator).exp()
            x[::17] *= _OUTLIER
            x[:, ::13] *= torch.where(torch.arange(self.tokens) % 3 == 0, _OUTLIER, 1.0)[:, None]
        x = x.to(device, dtype)
        row_max = None
        if self.parts:
            row_max = torch.stack([part.abs().amax(-1) for part in x.float().tensor_split(self.parts, dim=1)], dim=1)
        if self.apart:
            wide = torch.full((self.tokens, 3 * self.dim), float("nan"), dtype=dtype, device=device)
            wide[:, self.dim : 2 * self.dim] = x
            x = wide[:, self.dim : 2 * self.dim]
        return {"x": x, "row_max": row_max}


def in_torch(arguments: dict[str, Any]) -> Tensor:
    """x quantised with one scale for all rows, and back: what a scale per row is to beat."""
    x = arguments["x"].float()
    scale = x.abs().amax() / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def model_cases(sizes: ModelSizes) -> tuple[Case, ...]:
    """Attention's result, and that of GELU with and without the maxima of its tiles, at every picture size."""
    parts = sizes.ffn_dim // _GEMM_COLUMNS
    return tuple(
        case
        for tokens in sizes.block_tokens
        for case in (
            Case("attention", tokens, sizes.dim),
            Case("ffn", tokens, sizes.ffn_dim),
            Case("ffn, maxima known", tokens, sizes.ffn_dim, parts),
        )
    )


CASES = (
    Case("plain", 63, 96),
    Case("one token", 1, 1000),
    Case("model's dim", 3, 5120),
    Case("a slice", 5, 33, apart=True),
    Case("maximum known", 63, 40, parts=1),
    Case("maxima known, some chunks", 3, 5000, parts=39),
    Case("maxima known, a slice", 7, 2080, parts=3, apart=True),
    Case("outliers", 63, 200, outliers=True),
    Case("outliers, maxima known", 37, 200, parts=7, outliers=True),
)
