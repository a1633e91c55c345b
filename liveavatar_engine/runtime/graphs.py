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

    def stream(self, *, callers_wait: bool = True) -> AbstractContextManager[None]:
        """Where work is recorded and replayed, after all that was enqueued before.

        What callers enqueue later comes after it, too, if they wait.
        """
        ...

    def hand_out(self, tensor: Tensor) -> Tensor:
        """A tensor made inside `stream`, for use after it."""
        ...

    def take_in(self, tensor: Tensor) -> Tensor:
        """A tensor made outside of `stream`, for use inside, also when its owner forgets it."""
        ...


class PlainCalls:
    """Repeats work by calling it again."""

    def record(self, work: Work) -> Work:
        return work

    def stream(self, *, callers_wait: bool = True) -> AbstractContextManager[None]:
        return nullcontext()

    def hand_out(self, tensor: Tensor) -> Tensor:
        return tensor

    def take_in(self, tensor: Tensor) -> Tensor:
        return tensor


class CudaGraphs:
    """Captures work; all graphs share one stream and one memory pool, so they must not run at the same time.

    Args:
        device: that they run on.
        urgent: whether their work goes before that of other streams.
    """

    def __init__(self, device: torch.device, urgent: bool = False) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1 if urgent else 0)
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
    def stream(self, *, callers_wait: bool = True) -> Iterator[None]:
        self._callers = callers = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(callers)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            if callers_wait:
                callers.wait_stream(self._stream)

    def hand_out(self, tensor: Tensor) -> Tensor:
        """Keeps the allocator from giving its memory to this stream's work while the callers' still reads it."""
        tensor.record_stream(self._callers)
        return tensor

    def take_in(self, tensor: Tensor) -> Tensor:
        if tensor.is_cuda:
            tensor.record_stream(self._stream)
        return tensor


def recorder(device: torch.device, graphs: bool, urgent: bool = False) -> Recorder:
    """CUDA graphs where they are wanted and the device has them; `urgent` work goes before that of other streams."""
    return CudaGraphs(device, urgent) if graphs and device.type == "cuda" else PlainCalls()
