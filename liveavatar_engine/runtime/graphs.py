"""Work that is recorded once and replayed: CUDA graphs, or plain calls where there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], None]
"""Reads and writes tensors that always are the same, and decides nothing on the host."""


class Recorder(Protocol):
    """Turns work into something that does it again, with whatever its tensors hold by then."""

    def record(self, work: Work) -> Work:
        """Return what does the work again and again; it may be done while it is recorded."""
        ...

    def stream(self) -> AbstractContextManager[None]:
        """Where work is recorded and replayed, after all that was enqueued before, and before all that follows."""
        ...

    def hand_out(self, tensor: Tensor) -> Tensor:
        """A tensor made inside `stream`, for use after it."""
        ...


class PlainCalls:
    """Repeats work by calling it again."""

    def record(self, work: Work) -> Work:
        return work

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def hand_out(self, tensor: Tensor) -> Tensor:
        return tensor


class CudaGraphs:
    """Captures work; all graphs share one stream and one memory pool, so they must not run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._callers = torch.cuda.current_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        """Capture the work after one plain run, in which kernels are compiled, loaded and chosen."""
        work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    @contextmanager
    def stream(self) -> Iterator[None]:
        self._callers = callers = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(callers)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            callers.wait_stream(self._stream)

    def hand_out(self, tensor: Tensor) -> Tensor:
        """Keeps the allocator from giving its memory to this stream's work while the callers' still reads it."""
        tensor.record_stream(self._callers)
        return tensor


def recorder(device: torch.device, graphs: bool) -> Recorder:
    """CUDA graphs where they are wanted and the device has them."""
    return CudaGraphs(device) if graphs and device.type == "cuda" else PlainCalls()
