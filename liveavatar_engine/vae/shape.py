"""The VAE's sizes, read from the tensors of its checkpoint: it has no config file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import CheckpointError


@dataclass(frozen=True)
class VaeShape:
    """Widths and depths of encoder and decoder.

    Attributes:
        widths: channels of each encoder level, from full resolution down.
        blocks: residual blocks per encoder level; the decoder has one more.
        in_time: whether the step from level i to i + 1 also halves the frame rate.
        latent_channels: channels of a latent.
    """

    widths: tuple[int, ...]
    blocks: int
    in_time: tuple[bool, ...]
    latent_channels: int

    @classmethod
    def of_tensors(cls, shapes: Mapping[str, tuple[int, ...]]) -> VaeShape:
        """Read the sizes from tensor names and shapes: the encoder's, or the decoder's where there is no encoder.

        Raises:
            CheckpointError: they are not those of a Wan 2.1 VAE.
        """
        widths, in_time, blocks = _levels(shapes, "encoder.downsamples")
        if not widths:
            widths, in_time, blocks = (part[::-1] for part in _levels(shapes, "decoder.upsamples"))
            blocks = [count - 1 for count in blocks]
        latent = shapes.get("conv2.weight")
        if not in_time or latent is None or len(set(blocks)) != 1:
            raise CheckpointError("not the tensors of a Wan 2.1 VAE (encoder.downsamples.N..., conv2.weight)")
        return cls(tuple(widths), blocks[0], tuple(map(bool, in_time)), latent[0])

    @classmethod
    def wan21(cls, width: int = 96) -> VaeShape:
        """The published VAE has width 96."""
        return cls((width, 2 * width, 4 * width, 4 * width), 2, (False, True, True), 16)


def _levels(shapes: Mapping[str, tuple[int, ...]], stack: str) -> tuple[list[int], list[int], list[int]]:
    """Of a stack of layers, in order: width and residual blocks of each level, and which steps between are in time."""
    widths: list[int] = []
    in_time: list[int] = []
    blocks = [0]
    width = 0
    numbers = {int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(stack)}\.(\d+)\.", name))}
    for number in sorted(numbers):
        prefix = f"{stack}.{number}."
        if (residual := shapes.get(prefix + "residual.6.weight")) is not None:
            width = residual[0]
            blocks[-1] += 1
        elif prefix + "resample.1.weight" in shapes and blocks[-1]:
            widths.append(width)
            in_time.append(prefix + "time_conv.weight" in shapes)
            blocks.append(0)
    return ([*widths, width] if width else []), in_time, blocks
