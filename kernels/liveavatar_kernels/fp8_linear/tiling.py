"""How a product is cut into tiles on a device; needs no Triton, because the CUDA kernel follows the same rules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROW_MAX_COLUMNS = 128
"""Columns of the result that share a row maximum, whatever tile computed them."""
HOPPER_PROCESSORS = 132
"""Of an H100 SXM or an H200."""
_GROUP = 8
_NARROW_COST = 1.08
"""Time of two 128x128 tiles over that of a 128x256 tile. Not measured: narrow tiles load a third more for a product."""
_LONG_SUM = 8192


def suits_tma(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether rows of x, of the weight and of a result in `dtype` are multiples of 16 bytes apart, as TMA needs them.

    Its other need, an address that is one, is left to the caller: tracing knows no addresses.
    """
    apart = (x.shape[1], weight.shape[0] * dtype.itemsize, x.stride(0), weight.stride(0))
    return all(distance % 16 == 0 for distance in apart)


def is_long_sum(in_features: int) -> bool:
    """Whether a sum is too long for Hopper's FP8 accumulator, which keeps about 22 bits.

    Partial sums then move to float32 registers, at some cost. The limit is not measured.
    """
    return in_features > _LONG_SUM


def suits_wide_tiles(tokens: int, out_features: int, processors: int) -> bool:
    """Whether tiles of 128x256 finish before tiles of 128x128, for whole waves of one tile per processor."""
    row_tiles = -(-tokens // 128)
    wide, narrow = (-(-row_tiles * -(-out_features // columns) // processors) for columns in (256, 128))
    return 2 * wide <= _NARROW_COST * narrow


@dataclass(frozen=True)
class Tiling:
    """How the kernel is launched.

    Attributes:
        tma: persistent programs that load and store through tensor descriptors; else a program per tile, and pointers.
        rows, columns: of a tile of the result.
        depth: elements of the sum per step.
        group: rows of tiles that are computed together, for the L2 cache.
        precise: move the partial sum of every step to float32 registers; only on sm_90 does it make a difference.
    """

    tma: bool
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = _GROUP
    precise: bool = False

    @classmethod
    def of(
        cls,
        capability: int,
        processors: int,
        tokens: int,
        in_features: int,
        out_features: int,
        itemsize: int = 2,
        tma: bool = True,
    ) -> Tiling:
        """For sm_`capability` (0: the interpreter), a result of `itemsize` bytes, and what TMA can take, or cannot.

        sm_89 has no TMA. sm_120 has, but shared memory for fewer stages; the plain kernel runs there until someone
        measures both. On sm_100 a 128x256 tile with GELU spills.
        """
        generation = capability // 10
        if generation == 0:
            return cls(tma, 64, 128, 64, 4, 1, group=2)
        precise = generation == 9 and is_long_sum(in_features)
        if generation not in (9, 10) or not tma:
            return cls(False, 128, 128, 64, 8, 4, precise=precise)
        wide = generation == 9 and not precise and itemsize <= 2
        wide = wide and suits_wide_tiles(tokens, out_features, processors)
        return cls(True, 128, 256 if wide else 128, 128, 8, 4, precise=precise)
