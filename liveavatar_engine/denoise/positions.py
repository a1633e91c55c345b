"""Where blocks stand in time: ring slots, angles of their tokens, how far the sink has rolled, which prompt is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from liveavatar_kernels.cache import FIXED, MOVED, RING, Window
from liveavatar_kernels.rotation import Angles
from torch import Tensor

from ..config import StreamGeometry
from ..config.geometry import REFERENCE_TIME
from ..model.attention import RingView, StepView
from ..model.rope import AxisFrequencies
from ..model.sequence import WHOLE, TokenSplit
from ..runtime.struct import DeviceStruct
from .caches import CacheLayout

_SEGMENTS = MOVED + 1


@dataclass(frozen=True)
class Scene:
    """What the blocks of a stream see besides their ring.

    Attributes:
        sink, text: slots of the arena.
        text_tokens, text_padding: tokens of the prompt, and the padding behind them.
    """

    sink: int
    text: int
    text_tokens: int
    text_padding: int


@dataclass(frozen=True)
class Place:
    """Where one step of a block stands.

    Attributes:
        ring: slot of the arena.
        block: index in its stream.
        frame: latent frame at which the block starts; positions have no end.
        distance: from the block to the reference image, in latent frames. The image stands at time
            max(30, frame + distance), never before its base time.
        scene: what it sees besides.
    """

    ring: int
    block: int
    frame: int
    distance: int
    scene: Scene


class StepPositions:
    """What kernels read about each step, and the noise of a new block if it enters here: one struct, one copy.

    Angles come from float64. Spatial ones are written once, all else by `write`. Ranks that share a step have the same.
    """

    def __init__(
        self,
        geometry: StreamGeometry,
        layout: CacheLayout,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
        split: TokenSplit = WHOLE,
        *,
        noise: bool = True,
    ) -> None:
        self._geometry, self._layout, self._steps, self._dtype = geometry, layout, steps, dtype
        self._split = split
        self._frequencies = AxisFrequencies.of(geometry.model.head_dim)
        pairs = len(self._frequencies.time)
        self._struct = DeviceStruct(
            {
                "at": ((steps, 2), torch.int32),
                "slots": ((steps, 2), torch.int32),
                "segments": ((steps, 1, _SEGMENTS, 2), torch.int32),
                "text": ((steps, 3), torch.int32),
                "time": ((steps, geometry.frames_per_block, 2, pairs), dtype),
                "shift": ((steps, 2, pairs), dtype),
                **({"noise": (geometry.block_shape, dtype)} if noise else {}),
            },
            device,
        )
        grid = self._frequencies.space_angles(range(geometry.grid_rows), range(geometry.grid_columns))
        self._space = _cos_sin(grid, dtype).to(device)

    @property
    def noise(self) -> Tensor:
        """Of the block that was written last, on the device: [channels, frames, latent_height, latent_width]."""
        return self._struct["noise"]

    def view(self, steps: slice) -> StepView:
        """What the groups of a call read that computes these steps; always the same tensors."""
        fields = self._struct
        rings = tuple(
            RingView(
                fields["at"][step],
                Angles(fields["time"][step], self._space),
                Window(fields["slots"][step], fields["segments"][step], fields["shift"][step]),
            )
            for step in range(self._steps)[steps]
        )
        return StepView(rings, fields["text"][steps], self._split)

    def write(self, places: Sequence[Place], noise: Tensor | None = None) -> None:
        """Write where each step stands, and noise on the CPU, and start their way to the device."""
        geometry, layout = self._geometry, self._layout
        starts = [place.block * layout.block_stride % layout.ring_tokens for place in places]
        valid = [min((place.block + 1) * layout.block_stride, layout.ring_tokens) for place in places]
        fixed = geometry.fixed_sink_tokens
        sink = {FIXED: (layout.sink_start, fixed), MOVED: (layout.sink_start + fixed, geometry.sink_tokens - fixed)}
        frames = [[place.frame + frame for frame in range(geometry.frames_per_block)] for place in places]
        shifts = [max(REFERENCE_TIME, place.frame + place.distance) - REFERENCE_TIME for place in places]
        host = self._struct.host()
        host["at"].copy_(torch.tensor([[place.ring, start] for place, start in zip(places, starts, strict=True)]))
        host["slots"].copy_(torch.tensor([[place.ring, place.scene.sink] for place in places]))
        host["segments"].zero_()
        host["segments"][:, 0, RING, 1] = torch.tensor(valid, dtype=torch.int32)
        for row, segment in sink.items():
            host["segments"][:, 0, row] = torch.tensor(segment, dtype=torch.int32)
        scenes = [place.scene for place in places]
        host["text"].copy_(torch.tensor([[s.text, s.text_tokens, s.text_padding] for s in scenes]))
        time = self._frequencies.time_angles([frame for block in frames for frame in block])
        host["time"].copy_(_cos_sin(time, self._dtype).view_as(host["time"]))
        host["shift"].copy_(_cos_sin(self._frequencies.time_angles(shifts), self._dtype))
        if noise is not None:
            host["noise"].copy_(noise)
        self._struct.send()


class SinkPositions:
    """What kernels read while a sink is prefilled: its tokens, `[fixed | reference]`, see each other and no more.

    They stand at their base positions, so only slots and the prompt change.
    """

    def __init__(
        self,
        geometry: StreamGeometry,
        layout: CacheLayout,
        device: torch.device,
        dtype: torch.dtype,
        split: TokenSplit = WHOLE,
    ) -> None:
        self._start, self._tokens, self._split = layout.sink_start, geometry.sink_tokens, split
        frequencies = AxisFrequencies.of(geometry.model.head_dim)
        segments = (*geometry.fixed_sink, geometry.reference_segment)
        angles = torch.cat([frequencies.angles(s.times, s.rows, s.columns) for s in segments])
        nowhere = torch.zeros(1, 0, dtype=angles.dtype)
        still = torch.zeros(1, len(frequencies.time), dtype=angles.dtype)
        self._angles = Angles(*(_cos_sin(table, dtype).to(device) for table in (angles, nowhere)))
        self._shift = _cos_sin(still, dtype)[0].to(device)
        fields = {"at": (2,), "slots": (2,), "segments": (1, _SEGMENTS, 2), "text": (1, 3)}
        self._struct = DeviceStruct({name: (shape, torch.int32) for name, shape in fields.items()}, device)

    def view(self) -> StepView:
        """What a layer reads; always the same tensors."""
        fields = self._struct
        window = Window(fields["slots"], fields["segments"], self._shift)
        return StepView((RingView(fields["at"], self._angles, window),), fields["text"], self._split)

    def write(self, scene: Scene) -> None:
        """Write which sink is prefilled, and with which prompt, and start their way to the device."""
        host = self._struct.host()
        host["at"].copy_(torch.tensor([scene.sink, self._start]))
        host["slots"].fill_(scene.sink)
        host["segments"].zero_()
        host["segments"][0, FIXED] = torch.tensor([self._start, self._tokens], dtype=torch.int32)
        host["text"].copy_(torch.tensor([[scene.text, scene.text_tokens, scene.text_padding]]))
        self._struct.send()


def _cos_sin(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 [rows, pairs] -> cosines and sines [rows, 2, pairs], rounded once to `dtype`."""
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(dtype)
