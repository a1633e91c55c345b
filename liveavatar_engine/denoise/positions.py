"""Where a block stands in time: ring slots, angles of its tokens, and how far the sink has rolled along."""

from __future__ import annotations

import torch
from liveavatar_kernels.cache import FIXED, MOVED, RING, Window
from liveavatar_kernels.rotation import Angles
from torch import Tensor

from ..config import StreamGeometry
from ..config.geometry import REFERENCE_TIME
from ..model.attention import RingView
from ..model.rope import AxisFrequencies
from .caches import StreamCaches
from .struct import DeviceStruct

_SEGMENTS = MOVED + 1


class StreamPositions:
    """What kernels read about a stream's blocks. Spatial angles are written once, all else by `block_views`.

    Angles come from float64, so positions have no end. `first_frame` is the latent frame at which the stream starts.
    """

    def __init__(
        self,
        geometry: StreamGeometry,
        caches: StreamCaches,
        steps: int,
        device: torch.device,
        first_frame: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._geometry, self._layout, self._slot = geometry, caches.layout, caches.slot
        self._device, self._dtype, self._first_frame = device, dtype, first_frame
        self._frequencies = AxisFrequencies.of(geometry.model.head_dim)
        pairs = len(self._frequencies.time)
        self._struct = DeviceStruct(
            {
                "at": ((2,), torch.int32),
                "slots": ((2,), torch.int32),
                "segments": ((steps, 1, _SEGMENTS, 2), torch.int32),
                "time": ((geometry.frames_per_block, 2, pairs), dtype),
                "shift": ((steps, 2, pairs), dtype),
            },
            device,
        )
        grid = self._frequencies.space_angles(range(geometry.grid_rows), range(geometry.grid_columns))
        angles = Angles(self._struct["time"], _cos_sin(grid, dtype).to(device))
        self._views = [
            RingView(
                self._struct["at"],
                angles,
                Window(self._struct["slots"], self._struct["segments"][step], self._struct["shift"][step]),
            )
            for step in range(steps)
        ]

    def sink_view(self) -> RingView:
        """For the prefill: the sink's tokens, `[fixed | reference]`, at base positions, see each other and no more."""
        geometry, start = self._geometry, self._layout.sink_start
        segments = (*geometry.fixed_sink, geometry.reference_segment)
        angles = torch.cat([self._frequencies.angles(s.times, s.rows, s.columns) for s in segments])
        nowhere = torch.zeros(1, 0, dtype=angles.dtype)
        table = torch.zeros(1, _SEGMENTS, 2, dtype=torch.int32)
        table[0, FIXED] = torch.tensor([start, geometry.sink_tokens])
        still = torch.zeros(len(self._frequencies.time), dtype=angles.dtype)
        return RingView(
            torch.tensor([self._slot, start], dtype=torch.int32).to(self._device),
            Angles(*(_cos_sin(table, self._dtype).to(self._device) for table in (angles, nowhere))),
            Window(
                torch.tensor([self._slot, self._slot], dtype=torch.int32).to(self._device),
                table.to(self._device),
                _cos_sin(still[None], self._dtype)[0].to(self._device),
            ),
        )

    def block_views(self, block: int, distances: list[int]) -> list[RingView]:
        """One view per step of `block`, which differ in the sink's distance only.

        The views share the stream's tensors on the device: they hold until the next call.

        At distance d the reference image stands at time max(30, current frame + d), never before its base time.
        """
        geometry, layout = self._geometry, self._layout
        first = self._first_frame + block * geometry.frames_per_block
        shifts = [max(REFERENCE_TIME, first + distance) - REFERENCE_TIME for distance in distances]
        fixed = geometry.fixed_sink_tokens
        valid = min((block + 1) * layout.block_stride, layout.ring_tokens)
        host = self._struct.host()
        host["at"].copy_(torch.tensor([self._slot, block * layout.block_stride % layout.ring_tokens]))
        host["slots"].fill_(self._slot)
        for row, segment in (
            (RING, (0, valid)),
            (FIXED, (layout.sink_start, fixed)),
            (MOVED, (layout.sink_start + fixed, geometry.sink_tokens - fixed)),
        ):
            host["segments"][:, :, row] = torch.tensor(segment, dtype=torch.int32)
        frames = range(first, first + geometry.frames_per_block)
        host["time"].copy_(_cos_sin(self._frequencies.time_angles(frames), self._dtype))
        host["shift"].copy_(_cos_sin(self._frequencies.time_angles(shifts), self._dtype))
        self._struct.send()
        return self._views


def _cos_sin(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 [rows, pairs] -> cosines and sines [rows, 2, pairs], rounded once to `dtype`."""
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(dtype)
