"""A torchrun job: its first process embeds the engine, the others are workers.

Processes find each other by torch's own rendezvous, so they can be on several nodes. The first process is no worker
itself: it starts one for its own rank beside it.
"""

from __future__ import annotations

import atexit
import itertools
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from liveavatar_kernels.environment import Environment

from ...errors import ConfigError
from .launch import Process
from .link import LOCALHOST, Address, connect
from .worker import Worker

_MEETINGS, _MEETING = "liveavatar/meetings", "liveavatar/meeting/{}"
_FOREVER = timedelta(days=365)


@dataclass(frozen=True)
class Job:
    """A process of a torchrun job, and the launcher of its workers.

    Attributes:
        rank: of this process.
        world_size: processes of the job.
        local_world_size: those on this node.
        master: where the job's store is.
    """

    rank: int
    world_size: int
    local_world_size: int
    master: Address

    @classmethod
    def current(cls) -> Job | None:
        """The job of which this process is part, if torchrun has started it.

        Raises:
            ConfigError: the environment is not what torchrun makes.
        """
        try:
            found = Environment.read().torchrun
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return None if found is None else cls(found.rank, found.world_size, found.local_world_size, found.master)

    @property
    def nodes(self) -> int:
        return -(-self.world_size // self.local_world_size)

    @property
    def host(self) -> str:
        """This node's address, as others reach it."""
        if self.nodes == 1:
            return LOCALHOST
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(self.master)
            return str(probe.getsockname()[0])

    def device_names(self) -> tuple[str, ...]:
        """A device for each rank: the GPU of its local rank, or a CPU process where there are none.

        On several nodes a GPU's name ends with its node: "cuda:0@1".
        """
        if not torch.cuda.is_available():
            return tuple(f"cpu:{rank}" for rank in range(self.world_size))
        places = [divmod(rank, self.local_world_size) for rank in range(self.world_size)]
        return tuple(f"cuda:{local}@{node}" if self.nodes > 1 else f"cuda:{local}" for node, local in places)

    def start(self, address: Address, key: bytes, ranks: int) -> list[Process]:
        """Tell the job's other processes where the front is, and start the first rank's worker."""
        store = self._store()
        if store.add(_MEETINGS, 0) == 0:
            atexit.register(_meet, store, {"end": True})
        _meet(store, {"address": list(address), "key": key.hex()})
        return [Process(0, address, key, self.host)]

    def serve(self) -> None:
        """Be this rank's worker, for one engine of the first process after another, until that process ends.

        In the main thread, SIGTERM lets the first process finish what is under way.
        """
        store = self._store()
        for meeting in itertools.count(1):
            store.wait([_MEETING.format(meeting)], _FOREVER)
            told = json.loads(store.get(_MEETING.format(meeting)))
            if "end" in told:
                return
            key, (host, port) = bytes.fromhex(told["key"]), told["address"]
            worker = Worker(connect((host, port), key), self.rank, key, self.host)
            with _on_termination(worker.drain):
                worker.serve()

    def _store(self) -> dist.Store:
        """The job's store, which torchrun's agent keeps."""
        return dist.TCPStore(*self.master, world_size=None, is_master=False)


def _meet(store: dist.Store, told: dict[str, object]) -> None:
    """Tell all ranks of a job something."""
    store.set(_MEETING.format(store.add(_MEETINGS, 1)), json.dumps(told))


@contextmanager
def _on_termination(call: Callable[[], None]) -> Iterator[None]:
    """SIGTERM calls this in the body, if it runs in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
