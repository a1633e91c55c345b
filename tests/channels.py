"""The two ends of a channel in one process, and messages that flow between them."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liveavatar_engine.pipeline.tpp.channel import Credits, LatentReceiver, LatentSender, Shipment
from liveavatar_engine.pipeline.tpp.transport import open_backend
from liveavatar_engine.runtime.group import Work

SHAPE = (3, 2, 5, 7)


@dataclass
class _Transfer:
    """What a sender has to give, and what its receiver has started."""

    tensors: list[Tensor]
    ready: torch.cuda.Event | None
    started: threading.Event = field(default_factory=threading.Event)
    work: Work | None = None


class _Done:
    """A copy on a CPU."""

    def wait(self) -> bool:
        return True


class Loopback:
    """A world of size 1 as the backend of both ends of a channel, each on a thread of its own.

    NCCL sends to itself only within a group. So the receiving thread starts both halves: on a GPU as one grouped
    operation, on a CPU as a copy. The sending thread waits until it has, and both get the same work to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self._nccl: Any = None
        self._transfers: queue.SimpleQueue[_Transfer] = queue.SimpleQueue()
        if device.type == "cuda":
            self._nccl = open_backend(device, dist.HashStore(), "loopback", 0, 1, "127.0.0.1")

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        transfer = _Transfer(tensors, None if self._nccl is None else torch.cuda.current_stream().record_event())
        self._transfers.put(transfer)
        transfer.started.wait()
        assert transfer.work is not None
        return transfer.work

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        transfer = self._transfers.get()
        transfer.work = self._copy(tensors, transfer)
        transfer.started.set()
        return transfer.work

    def _copy(self, tensors: list[Tensor], transfer: _Transfer) -> Work:
        if self._nccl is None:
            for into, of in zip(tensors, transfer.tensors, strict=True):
                into.copy_(of)
            return _Done()
        assert transfer.ready is not None
        transfer.ready.wait()
        self._nccl._start_coalescing()
        self._nccl.send(transfer.tensors, 0, 0)
        self._nccl.recv(tensors, 0, 0)
        return self._nccl._end_coalescing()

    def shutdown(self) -> None:
        if self._nccl is not None:
            self._nccl.shutdown()


@dataclass
class Flow:
    """Messages through a channel as two workers would exchange them, each with a stage and a thread for transfers.

    Attributes:
        sender, receiver: the two ends, which have greeted each other.
        pause: called at every turn of each thread.
        under_way: messages whose header has been sent and whose credit has not been given back, at most.
    """

    sender: LatentSender
    receiver: LatentReceiver
    pause: Callable[[], None]
    credits: Credits = field(default_factory=Credits)
    under_way: int = 0

    def run(self, make: Callable[[int], Tensor], use: Callable[[int, Shipment], None], count: int) -> None:
        """Let `make` make so many messages and `use` take each of them; it returns when it has been read."""
        loaded: queue.SimpleQueue[Shipment] = queue.SimpleQueue()
        headers: queue.SimpleQueue[int] = queue.SimpleQueue()
        arrived: queue.SimpleQueue[Shipment] = queue.SimpleQueue()
        given: list[int] = []

        def make_all() -> None:
            for number in range(count):
                self.pause()
                latents = make(number)
                loaded.put(self.sender.load(latents))
                latents.fill_(torch.nan)

        def send_all() -> None:
            for number in range(count):
                shipment = loaded.get()
                shipment.synchronize()
                self.pause()
                self.credits.take()
                headers.put(number)
                self.under_way = max(self.under_way, number + 1 - len(given))
                self.sender.send(shipment)

        def receive_all() -> None:
            for number in range(count):
                assert headers.get() == number
                self.pause()
                arrived.put(self.receiver.receive())

        def use_all() -> None:
            for number in range(count):
                shipment = arrived.get()
                use(number, shipment)
                shipment.latents.fill_(torch.nan)
                shipment.mark()
                shipment.synchronize()
                self.pause()
                given.append(number)
                self.credits.give()

        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(task) for task in (use_all, receive_all, send_all, make_all)]:
                done.result()


def random_pauses(seed: int, longest: float) -> Callable[[], None]:
    """A pause of up to `longest` seconds at one turn in eight."""
    chance, lock = random.Random(seed), threading.Lock()

    def pause() -> None:
        with lock:
            seconds = chance.random() * longest if chance.random() < 1 / 8 else 0.0
        if seconds:
            time.sleep(seconds)

    return pause
