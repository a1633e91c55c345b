"""Shapes of causal_conv3d, declared once for tests, benchmarks and warm-up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model_sizes import DecoderLevel, ModelSizes
from .reference import expanded, spatial_padding, to_bytes, to_torch

_RGB = 3


@dataclass(frozen=True)
class Case:
    """A convolution that makes `frames` frames.

    Attributes:
        form: which one it is.
        frames, height, width: of the result.
        kernel: frames, rows and columns.
        pixels: whether it writes uint8 frames.
    """

    form: str
    frames: int
    height: int
    width: int
    channels_in: int
    channels_out: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    bias: bool = False
    residual: bool = False
    upsample: bool = False
    interleaved: bool = False
    pixels: bool = False

    @property
    def name(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}, {self.form}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.channels_out, *self.kernel, self.channels_in)

    @property
    def x_shape(self) -> tuple[int, ...]:
        within, times = 1 + self.interleaved, 1 + self.upsample
        frames = self.frames // within + self.kernel[0] - 1
        return frames, self.height // times, self.width // times, self.channels_in * within

    @property
    def y_shape(self) -> tuple[int, ...]:
        return self.frames, self.height, self.width, self.channels_out

    @property
    def flops(self) -> int:
        """Those of taps on zeros around the picture included."""
        return 2 * torch.Size(self.weight_shape).numel() * self.frames * self.height * self.width

    @property
    def bytes(self) -> int:
        """Least traffic in bf16: everything is read or written once."""
        written = torch.Size(self.y_shape).numel()
        read = torch.Size(self.x_shape).numel() + torch.Size(self.weight_shape).numel()
        return 2 * (read + self.residual * written) + written * (1 if self.pixels else 2)

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of the op, random; results are of size one, so that some pixels are clamped."""
        generator = torch.Generator().manual_seed(seed)

        def random(shape: tuple[int, ...], size: float = 1.0) -> Tensor:
            return (size * torch.randn(shape, generator=generator)).to(device, dtype)

        terms = torch.Size(self.weight_shape[1:]).numel()
        arguments: dict[str, Any] = {
            "x": random(self.x_shape),
            "weight": random(self.weight_shape, terms**-0.5),
            "bias": random(self.y_shape[-1:]).to(torch.promote_types(dtype, torch.float32)) if self.bias else None,
        }
        if not self.pixels:
            arguments |= {
                "residual": random(self.y_shape) if self.residual else None,
                "upsample": self.upsample,
                "interleaved": self.interleaved,
            }
        return arguments


def in_torch(arguments: dict[str, Any]) -> Tensor:
    """The same maths in torch at x's precision: the yardstick for a kernel's error. Pixels are not rounded to bytes."""
    x, weight, bias = (arguments[name] for name in ("x", "weight", "bias"))
    theirs, kernel = to_torch(
        expanded(x, arguments.get("upsample", False), arguments.get("interleaved", False)), weight
    )
    y = (F.conv2d if theirs.ndim == 4 else F.conv3d)(theirs, kernel, padding=spatial_padding(kernel)).movedim(1, -1)
    y = y if y.ndim == 4 else y[0]
    for added in (bias, arguments.get("residual")):
        y = y if added is None else y + added.to(y.dtype)
    return y if "upsample" in arguments else to_bytes(y.float())


def model_cases(sizes: ModelSizes) -> tuple[Case, ...]:
    """The decoder's convolutions, a block of latents at once, at every picture size; each shape once."""
    cases: list[Case] = []
    for picture in sizes.pictures:
        levels = sizes.decoder_levels(picture)
        first, last = levels[0], levels[-1]
        cases.append(_case("latents in", first, sizes.latent_channels))
        cases += [_case(f"level {i}", level, level.channels) for i, level in enumerate(levels)]
        for i, (before, after) in enumerate(pairwise(levels)):
            cases += _between(i, before, after)
        wide = _case("attention's q, k, v", first, first.channels, (1, 1, 1), bias=True)
        cases.append(replace(wide, channels_out=3 * first.channels))
        cases.append(_case("after attention", first, first.channels, (1, 1, 1), bias=True, residual=True))
        cases.append(replace(_case("pixels out", last, last.channels, bias=True, pixels=True), channels_out=_RGB))
    return tuple(cases)


def _between(i: int, before: DecoderLevel, after: DecoderLevel) -> list[Case]:
    """What doubles the picture between two levels, and the time, and what widens its channels after that."""
    halved, in_time = before.channels // 2, after.frames > before.frames
    up = _case(f"up from level {i}", after, before.channels, (1, 3, 3), upsample=True, interleaved=in_time)
    cases = [replace(up, channels_out=halved)]
    if in_time:
        time = _case(f"in time from level {i}", before, before.channels, (3, 1, 1), bias=True)
        cases.append(replace(time, channels_out=2 * before.channels))
    if halved != after.channels:
        cases.append(_case(f"into level {i + 1}", after, halved))
        cases.append(_case(f"shortcut into level {i + 1}", after, halved, (1, 1, 1), bias=True))
    return cases


def _case(
    form: str, level: DecoderLevel, channels_in: int, kernel: tuple[int, int, int] = (3, 3, 3), **more: bool
) -> Case:
    return Case(form, level.frames, level.height, level.width, channels_in, level.channels, kernel, **more)


CASES = (
    Case("past", 2, 5, 7, 8, 16, bias=True, residual=True),
    Case("96 channels", 1, 6, 11, 96, 96),
    Case("192 channels over time", 2, 3, 5, 192, 192, (3, 1, 1), bias=True),
    Case("upsampled", 3, 6, 10, 8, 4, (1, 3, 3), upsample=True, bias=True),
    Case("interleaved", 4, 5, 3, 16, 8, (1, 3, 3), interleaved=True),
    Case("upsampled and interleaved", 2, 10, 14, 4, 4, (1, 3, 3), upsample=True, interleaved=True, residual=True),
    Case("latents in", 3, 3, 4, 16, 20),
    Case("points", 2, 4, 9, 12, 36, (1, 1, 1), bias=True, residual=True),
    Case("rows alone", 1, 9, 2, 24, 5, (2, 3, 1)),
    Case("one pixel", 1, 1, 1, 4, 4),
    Case("a dozen frames", 12, 2, 3, 4, 8, (1, 1, 3), bias=True),
    Case("pixels out", 2, 7, 13, 8, 3, bias=True, pixels=True),
)
