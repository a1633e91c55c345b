"""Where a block stands in time: ring slots, angles of its tokens, and how far the sink has rolled along."""

from __future__ import annotations

import torch

from ..config import StreamGeometry
from ..config.geometry import REFERENCE_TIME
from ..model.attention import RingView
from ..model.rope import AxisFrequencies, Rotation, rotation_of


class StreamPositions:
    """Angle tables of a stream. Spatial angles are written once; a block rewrites the temporal ones in place.

    Angles come from float64, so positions have no end. `first_frame` is the latent frame at which the stream starts.
    """

    def __init__(
        self,
        geometry: StreamGeometry,
        device: torch.device,
        first_frame: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._geometry, self._device, self._dtype = geometry, device, dtype
        self._first_frame = first_frame
        self._frequencies = AxisFrequencies.of(geometry.model.head_dim)
        self._time_pairs = len(self._frequencies.time)
        self._block_rotation = rotation_of(
            self._frequencies.angles(
                range(geometry.frames_per_block), range(geometry.grid_rows), range(geometry.grid_columns)
            ),
            device,
            dtype,
        )

    def sink_rotation(self) -> Rotation:
        """Angles of the sink's tokens, `[fixed | reference]`, at the positions where they are prefilled."""
        segments = (*self._geometry.fixed_sink, self._geometry.reference_segment)
        angles = [self._frequencies.angles(s.times, s.rows, s.columns) for s in segments]
        return rotation_of(torch.cat(angles), self._device, self._dtype)

    def block_views(self, block: int, distances: list[int]) -> list[RingView]:
        """One view per step of `block`, which differ in the sink's distance only.

        The views share the stream's angle table: they hold until the next call.

        At distance d the reference image stands at time max(30, current frame + d), never before its base time.
        """
        geometry = self._geometry
        first = self._first_frame + block * geometry.frames_per_block
        self._write_times(range(first, first + geometry.frames_per_block))
        written = block * geometry.tokens_per_block
        shifts = [max(REFERENCE_TIME, first + distance) - REFERENCE_TIME for distance in distances]
        return [
            RingView(
                start=written % geometry.ring_tokens,
                valid=min(written + geometry.tokens_per_block, geometry.ring_tokens),
                rotation=self._block_rotation,
                shift=self._shift(shift),
                fixed_tokens=geometry.fixed_sink_tokens,
            )
            for shift in shifts
        ]

    def _write_times(self, frames: range) -> None:
        times = rotation_of(self._frequencies.time_angles(frames), self._device, self._dtype)
        for table, values in ((self._block_rotation.cos, times.cos), (self._block_rotation.sin, times.sin)):
            by_frame = table.unflatten(0, (len(frames), -1))
            by_frame[..., : self._time_pairs] = values[:, None]

    def _shift(self, frames: int) -> Rotation:
        table = rotation_of(self._frequencies.time_angles([frames]), self._device, self._dtype)
        return Rotation(table.cos[0], table.sin[0])
