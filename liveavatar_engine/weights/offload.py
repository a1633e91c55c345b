"""Weights that live in host memory and visit the device while they are used."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import DeviceMemoryError

Arrival = Callable[[], list[Tensor]]
"""Waits until tensors have arrived on the device, and hands them out."""

_SLAB = 1 << 29
"""Bytes of host memory locked at a time: torch rounds each request up to a power of two."""
_ALIGNMENT = 256
_THREADS = 4
"""That copy weights, which a mapped file still holds, into locked memory."""


class Fetcher(Protocol):
    """Keeps tensors on the host and brings copies of them to the device."""

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in the host memory that it is fetched from; several threads may call this."""
        ...

    def fetch(self, kept: Sequence[Tensor]) -> Arrival:
        """Start copying tensors to the device."""
        ...


class CudaFetcher:
    """Fetches from page-locked memory, on a stream of its own, while the device computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0
        self._lock = threading.Lock()

    def keep(self, tensor: Tensor) -> Tensor:
        """Copy a tensor into locked memory.

        Raises:
            DeviceMemoryError: the system locks no more memory.
        """
        return self._place(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _place(self, count: int) -> Tensor:
        with self._lock:
            if self._used + count > len(self._slab):
                self._slab, self._used = _locked(max(count, _SLAB)), 0
            place = self._slab[self._used : self._used + count]
            self._used += math.ceil(count / _ALIGNMENT) * _ALIGNMENT
        return place

    def fetch(self, kept: Sequence[Tensor]) -> Arrival:
        copies = [torch.empty_like(tensor, device=self._device) for tensor in kept]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # it may still use that memory
        with torch.cuda.stream(self._stream):
            for copy, tensor in zip(copies, kept, strict=True):
                copy.copy_(tensor, non_blocking=True)
        arrived = self._stream.record_event()

        def arrival() -> list[Tensor]:
            torch.cuda.current_stream(self._device).wait_event(arrived)
            return copies

        return arrival


def _locked(count: int) -> Tensor:
    try:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise DeviceMemoryError(
            f"host: {count / 1e9:.2f} GB of memory cannot be locked for offloaded weights ({error}); offload less"
        ) from error


class HostWeights:
    """The parameters of a module, at home in host memory."""

    def __init__(self, module: nn.Module, fetcher: Fetcher) -> None:
        """Move them there; from here on the module can be used only between `arrive` and `leave`."""
        self._fetcher = fetcher
        self._parameters = list(module.parameters())
        self._home = [fetcher.keep(parameter.data) for parameter in self._parameters]
        self._arrival: Arrival | None = None
        self.leave()

    def send(self) -> None:
        """Start their way to the device."""
        self._arrival = self._fetcher.fetch(self._home)

    def arrive(self) -> None:
        """Put the copies on the device, which have been sent, into the module."""
        assert self._arrival is not None
        for parameter, copy in zip(self._parameters, self._arrival(), strict=True):
            parameter.data = copy
        self._arrival = None

    def leave(self) -> None:
        """Drop the copies on the device, also those that are still on their way."""
        if self._arrival is not None:
            self._arrival()  # their memory must not be given away before they have come
            self._arrival = None
        for parameter, home in zip(self._parameters, self._home, strict=True):
            parameter.data = home


class Visit:
    """A context in which a module's weights are on the device; users at the same time, on one stream, share a stay."""

    def __init__(self, weights: HostWeights) -> None:
        self._weights = weights
        self._lock, self._users = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._weights.send()
                self._weights.arrive()
            self._users += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._weights.leave()


class LayerVisits:
    """A context in which layers run in order, each on the device for its own turn while the next one is on its way.

    At most two layers are on the device, and none when the context ends. One user at a time; others wait.
    """

    def __init__(self, layers: Sequence[nn.Module], fetcher: Fetcher) -> None:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="liveavatar-keep") as pool:
            self._layers = list(pool.map(lambda layer: HostWeights(layer, fetcher), layers))
        self._lock = threading.Lock()
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before, index))
            layer.register_forward_hook(partial(self._after, index))

    def __enter__(self) -> None:
        self._lock.acquire()
        self._layers[0].send()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._layers:
            layer.leave()
        self._lock.release()

    def _before(self, index: int, *_: Any) -> None:
        self._layers[index].arrive()
        if index + 1 < len(self._layers):
            self._layers[index + 1].send()

    def _after(self, index: int, *_: Any) -> None:
        self._layers[index].leave()
