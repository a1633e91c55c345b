"""How the Triton convolution is cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass

_LEAST = 16
"""The smallest side of a matrix product in Triton."""
_MOST_COLUMNS = 128
_MOST_DEPTH = 64
_LITTLE_SHARED_MEMORY = (89, 120)


@dataclass(frozen=True)
class Tiling:
    """A program's share.

    Attributes:
        rows: pixels.
        columns, more_columns: output channels, as two tiles of powers of two; the second may be empty.
        depth: input channels of a tap per step.
    """

    rows: int
    columns: int
    more_columns: int
    depth: int
    warps: int
    stages: int

    @property
    def all_columns(self) -> int:
        return self.columns + self.more_columns

    @classmethod
    def of(cls, capability: int, channels_in: int, channels_out: int, itemsize: int = 2) -> Tiling:
        """For sm_`capability` (0: the interpreter) and elements of `itemsize` bytes.

        Where 96 divides the output channels, a program takes 96 of them as 64 + 32, or 192 as 128 + 64. Twice the
        rows for 96 channels halve how often weights are read. None of it is measured.
        """
        depth = min(_MOST_DEPTH, max(_LEAST, channels_in & -channels_in))
        if capability == 0:
            return cls(64, *_columns(channels_out), depth, 4, 1)
        if itemsize > 2:  # no matrix instructions: sums and operands fill the registers
            return cls(64, min(32, _columns(channels_out)[0]), 0, min(32, depth), 4, 2)
        columns, more = _columns(channels_out)
        if columns + more > _MOST_COLUMNS:
            shallow = capability in _LITTLE_SHARED_MEMORY
            return cls(128, columns, more, min(32, depth) if shallow else depth, 8, 3)
        return cls(256, columns, more, depth, 8, 3 if depth == _MOST_DEPTH else 4)


def _columns(channels_out: int) -> tuple[int, int]:
    for columns, more in ((128, 64), (64, 32)):
        if channels_out % (columns + more) == 0:
            return columns, more
    filled = 1 << (channels_out - 1).bit_length()
    return min(_MOST_COLUMNS, max(_LEAST, filled)), 0
