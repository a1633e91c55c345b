"""Shapes of channel_norm, declared once for tests, benchmarks and warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model_sizes import ModelSizes
from .reference import NORM_EPS


@dataclass(frozen=True)
class Case:
    """Channels of every position of a few frames; `zeros` of the positions sum up to nothing but zeros.

    Attributes:
        form: what is done.
        bias, residual: whether they are added.
        total: whether the sum is written.
    """

    form: str
    shape: tuple[int, ...]
    channels: int
    bias: bool = False
    residual: bool = False
    total: bool = False
    silu: bool = True
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
        return self.positions * self.channels * 2 * (2 + self.residual + self.total)

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of the op, random."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        arguments: dict[str, Any] = {"silu": self.silu, "gamma": (1 + 0.3 * random(self.channels)).to(device, wide)}
        for name, there in (("x", True), ("residual", self.residual)):
            tensor = 3 * random(*self.shape, self.channels)
            tensor.view(-1, self.channels)[: self.zeros] = 0
            arguments[name] = tensor.to(device, dtype) if there else None
        arguments["bias"] = random(self.channels).to(device, wide) if self.bias else None
        if self.total:
            arguments["sum_out"] = torch.empty_like(arguments["x"])
        return arguments


def in_torch(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same maths in torch at x's precision, sum and values: the yardstick for a kernel's error."""
    x, gamma = arguments["x"], arguments["gamma"]
    for added in (arguments["bias"], arguments["residual"]):
        x = x if added is None else x + added.to(x.dtype)
    least = max(NORM_EPS, torch.finfo(x.dtype).tiny)
    normed = F.normalize(x, dim=-1, eps=least) * (x.shape[-1] ** 0.5 * gamma.to(x.dtype))
    return x, F.silu(normed) if arguments["silu"] else normed


def model_cases(sizes: ModelSizes) -> tuple[Case, ...]:
    """The norms of the decoder's levels, a block of latents at once, at every picture size.

    A residual block begins with a sum that its shortcut reads later, and has a norm between its convolutions whose sum
    nobody reads.
    """
    cases = []
    for picture in sizes.pictures:
        for level in sizes.decoder_levels(picture):
            shape = (level.frames, level.height * level.width)
            cases += [
                Case("bias and residual, sum kept", shape, level.channels, bias=True, residual=True, total=True),
                Case("bias", shape, level.channels, bias=True),
            ]
    return tuple(cases)


CASES = (
    Case("alone", (2, 3, 17), 96),
    Case("bias", (63,), 192, bias=True),
    Case("residual", (11,), 96, residual=True),
    Case("bias and residual, sum kept", (1, 2, 3, 5), 384, bias=True, residual=True, total=True),
    Case("bias, sum kept, no SiLU", (33,), 96, bias=True, total=True, silu=False),
    Case("one position, no SiLU", (1,), 32, silu=False),
    Case("uneven channels, sum kept", (9,), 1000, residual=True, total=True),
    Case("few channels, bias and residual", (63,), 5, bias=True, residual=True),
    Case("zeros, sum kept", (7,), 96, residual=True, total=True, zeros=3),
)
