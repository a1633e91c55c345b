"""Stage times of a block, without a host sync inside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimer:
    """Measures stages on the device's own clock.

    What a stage takes in several turns is added up.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: dict[str, list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what the `with` body puts on the device (GPU) or does (CPU)."""
        start = self._mark()
        yield
        self._spans.setdefault(name, []).append((start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage; waits until the device has finished them."""
        return {name: sum(_between(*span) for span in spans) for name, spans in self._spans.items()}

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return start.elapsed_time(end) / 1000
