"""Rotary positions over (time, row, column), with angles from float64 so that streams have no end.

A head of d dims has d/2 pairs: d/2 - 2 (d/6) temporal ones, then d/6 for the row and d/6 for the column. Each axis has
its own frequencies 10000^(-2i / axis_dim) with axis_dim twice its pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_THETA = 10_000.0


@dataclass(frozen=True)
class AxisFrequencies:
    """Radians per unit of position for each pair of each axis; float64 on the CPU."""

    time: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def of(cls, head_dim: int) -> AxisFrequencies:
        spatial = head_dim // 6
        return cls(_frequencies(head_dim // 2 - 2 * spatial), _frequencies(spatial), _frequencies(spatial))

    def angles(self, times: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Angles of the grid times x rows x columns, flattened in that order: float64 [tokens, head_dim / 2]."""
        shape = (len(times), len(rows), len(columns))
        parts = (
            _outer(times, self.time)[:, None, None],
            _outer(rows, self.row)[None, :, None],
            _outer(columns, self.column)[None, None, :],
        )
        return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], dim=-1).flatten(0, 2)

    def space_angles(self, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Spatial angles of the grid rows x columns: float64 [positions, spatial_pairs]."""
        return self.angles((0,), rows, columns)[:, len(self.time) :]

    def time_angles(self, positions: Sequence[int]) -> Tensor:
        """Temporal angles only: float64 [positions, temporal_pairs]."""
        return _outer(positions, self.time)


def _frequencies(pairs: int) -> Tensor:
    return _THETA ** -(torch.arange(pairs, dtype=torch.float64) / pairs)


def _outer(positions: Sequence[int], frequencies: Tensor) -> Tensor:
    return torch.outer(torch.tensor(positions, dtype=torch.float64), frequencies)
