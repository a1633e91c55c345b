"""Latents on their way from one stage to the next, while both go on computing.

Each end has two buffers that take turns. The sender's stage copies a block's latents into one of its own; when they
are there, a header is sent over a CPU link, and the transfer is started on a stream of its own. The receiver starts to
receive when the header has come, never earlier: a posted NCCL receive keeps multiprocessors spinning. The sender starts
no transfer without a credit for a free buffer of the receiver; so neither end ever waits on a GPU for the other.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .transport import Backend

BUFFERS = 2
_TAG = 0


class Shipment:
    """Latents in a buffer of this end, on their way.

    Attributes:
        latents: float32 [channels, frames, latent_height, latent_width]; to be read after `wait`.
    """

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents
        self._event = torch.cuda.Event() if latents.is_cuda else None

    def mark(self) -> None:
        """What the current stream has been given so far makes the latents."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> Tensor:
        """Let the current stream wait until the latents are there; returns them."""
        if self._event is not None:
            self._event.wait()
        return self.latents

    def synchronize(self) -> None:
        """Let the caller wait until the latents are there."""
        if self._event is not None:
            self._event.synchronize()


class _Buffers(ABC):
    """The buffers of one end, and the stream of its transfers."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, backend: Backend) -> None:
        self._backend = backend
        self._shipments = [Shipment(torch.zeros(*shape, dtype=dtype, device=device)) for _ in range(BUFFERS)]
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def greet(self) -> None:
        """A first transfer, which connects the two ends; both must call it."""
        with self._on_stream(), torch.inference_mode():
            self._transfer(self._shipments[0].latents)
            self._shipments[0].mark()
        self._shipments[0].synchronize()

    @abstractmethod
    def _transfer(self, latents: Tensor) -> None:
        """Send or receive, in the current stream."""

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class Credits:
    """Transfers that the other end has room for; they outlive buffers, which are replaced when all of them are free."""

    def __init__(self) -> None:
        self._left = threading.Semaphore(BUFFERS)

    def give(self) -> None:
        """The other end has a free buffer again."""
        self._left.release()

    def take(self) -> None:
        """Wait, on the host, until the other end has room for one more transfer."""
        self._left.acquire()


class LatentSender(_Buffers):
    """The end of a channel that latents leave from. `peer` is the other end's rank in the backend."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, backend: Backend, peer: int
    ) -> None:
        super().__init__(shape, dtype, device, backend)
        self._peer = peer
        self._free = threading.Semaphore(BUFFERS)
        self._ready = deque(self._shipments)

    def load(self, latents: Tensor) -> Shipment:
        """Copy latents that the current stream makes into a free buffer; waits, on the host, until there is one."""
        self._free.acquire()
        shipment = self._ready.popleft()
        shipment.latents.copy_(latents)
        shipment.mark()
        return shipment

    def send(self, shipment: Shipment) -> None:
        """Transfer latents, for which a credit has been taken; returns when their buffer is free again."""
        with self._on_stream(), torch.inference_mode():
            self._transfer(shipment.wait())
            shipment.mark()
        shipment.synchronize()
        self._ready.append(shipment)
        self._free.release()

    def _transfer(self, latents: Tensor) -> None:
        self._backend.send([latents], self._peer, _TAG).wait()


class LatentReceiver(_Buffers):
    """The end of a channel where latents arrive. `peer` is the other end's rank in the backend."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, backend: Backend, peer: int
    ) -> None:
        super().__init__(shape, dtype, device, backend)
        self._peer, self._next = peer, 0

    def receive(self) -> Shipment:
        """Take the transfer whose header has come; its buffer is used again after the credit that it needs."""
        shipment = self._shipments[self._next]
        self._next = (self._next + 1) % BUFFERS
        with self._on_stream(), torch.inference_mode():
            self._transfer(shipment.latents)
            shipment.mark()
        return shipment

    def _transfer(self, latents: Tensor) -> None:
        self._backend.recv([latents], self._peer, _TAG).wait()
