"""Stage times of a block, without a host sync inside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Mark = float | torch.cuda.Event
"""A moment on a device's clock."""


_READINGS = 5


class DeviceClock:
    """Moments of a device as seconds of a clock of the host.

    Both are read several times, and the closest readings count: something else may have been run between two of them.

    Args:
        device: that the moments are of; a GPU is waited for.
        clock: of the host.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.time) -> None:
        readings = [_read_together(device, clock) for _ in range(_READINGS)]
        _, self._start, self._offset = min(readings, key=lambda reading: reading[0])

    def at(self, mark: Mark) -> float:
        """When a `StageTimer`'s mark was; waits for it."""
        return self._offset + _between(self._start, mark)


def _read_together(device: torch.device, clock: Callable[[], float]) -> tuple[float, Mark, float]:
    """How long it took to read both clocks; a moment of the device; when that was, give or take half of it."""
    before = clock()
    mark: Mark = time.perf_counter()
    if device.type == "cuda":
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(device))
        mark.synchronize()
    after = clock()
    return after - before, mark, (before + after) / 2


class StageTimer:
    """Measures stages on the device's own clock.

    What a stage takes in several turns is added up.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: dict[str, list[tuple[Mark, Mark]]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what the `with` body puts on the device (GPU) or does (CPU)."""
        start = self._mark()
        yield
        self._spans.setdefault(name, []).append((start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage; waits until the device has finished them."""
        return {name: sum(_between(*span) for span in spans) for name, spans in self._spans.items()}

    def spans(self) -> list[tuple[str, Mark, Mark]]:
        """Name, start and end of every turn, in order."""
        return [(name, *span) for name, spans in self._spans.items() for span in spans]

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return start.elapsed_time(end) / 1000
