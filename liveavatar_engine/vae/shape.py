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
        """Read the sizes from tensor names and shapes.

        Raises:
            CheckpointError: they are not those of a Wan 2.1 VAE.
        """
        widths, in_time, blocks_per_level, blocks = [], [], [], 0
        numbers = {int(m[1]) for name in shapes if (m := re.match(r"encoder\.downsamples\.(\d+)\.", name))}
        for number in sorted(numbers):
            prefix = f"encoder.downsamples.{number}."
            if (residual := shapes.get(prefix + "residual.6.weight")) is not None:
                blocks += 1
                width = residual[0]
            elif prefix + "resample.1.weight" in shapes and blocks:
                widths.append(width)
                blocks_per_level.append(blocks)
                in_time.append(prefix + "time_conv.weight" in shapes)
                blocks = 0
        latent = shapes.get("conv2.weight")
        if not blocks or latent is None or set(blocks_per_level) != {blocks}:
            raise CheckpointError("not the tensors of a Wan 2.1 VAE (encoder.downsamples.N..., conv2.weight)")
        return cls((*widths, width), blocks, tuple(in_time), latent[0])

    @classmethod
    def wan21(cls, width: int = 96) -> VaeShape:
        """The published VAE has width 96."""
        return cls((width, 2 * width, 4 * width, 4 * width), 2, (False, True, True), 16)
