"""Shapes of rms_norm_silu, declared once for tests, benchmarks and warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model_sizes import ModelSizes
from .reference import NORM_EPS

_TOKEN_PIXELS = 256
"""Pixels of a token: 2 x 2 latents of 8 x 8 each."""
_LATENT_FRAMES = 4
"""Frames that a latent becomes."""


@dataclass(frozen=True)
class Case:
    """Channels of every position of a few frames; `zeros` of the positions hold nothing but zeros."""

    form: str
    shape: tuple[int, ...]
    channels: int
    zeros: int = 0

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.shape))} positions of {self.channels}, {self.form}"

    @property
    def positions(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Least traffic at two bytes an element."""
        return self.positions * self.channels * 2 * 2

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of the op, random."""
        generator = torch.Generator().manual_seed(seed)
        x = 3 * torch.randn(*self.shape, self.channels, generator=generator)
        x.view(-1, self.channels)[: self.zeros] = 0
        gamma = 1 + 0.3 * torch.randn(self.channels, generator=generator)
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        return {"x": x.to(device, dtype), "gamma": gamma.to(device, wanted)}


def in_torch(arguments: dict[str, Any]) -> Tensor:
    """The same maths in torch at x's precision: the yardstick for a kernel's error."""
    x = arguments["x"]
    gamma = arguments["gamma"].to(x.dtype)
    least = max(NORM_EPS, torch.finfo(x.dtype).tiny)
    return F.silu(F.normalize(x, dim=-1, eps=least) * (x.shape[-1] ** 0.5 * gamma))


def model_cases(sizes: ModelSizes) -> tuple[Case, ...]:
    """The decoder's levels of 384, 192 and 96 channels, a block of latents at once, at every picture size."""
    cases = []
    for tokens in sizes.block_tokens:
        pixels = tokens // sizes.block_frames * _TOKEN_PIXELS
        frames = _LATENT_FRAMES * sizes.block_frames
        cases += [
            Case("full size", (frames, pixels), 96),
            Case("half size", (frames, pixels // 4), 192),
            Case("quarter size", (frames // 2, pixels // 16), 384),
        ]
    return tuple(cases)


CASES = (
    Case("full size", (2, 3, 17), 96),
    Case("half size", (63,), 192),
    Case("quarter size", (1, 2, 3, 5), 384),
    Case("one position", (1,), 32),
    Case("uneven channels", (9,), 1000),
    Case("few channels", (63,), 5),
    Case("zeros", (7,), 96, zeros=3),
)
