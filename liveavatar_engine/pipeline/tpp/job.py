"""A torchrun job: its first process embeds the engine, the others are workers.

Processes find each other by torch's own rendezvous, so they can be on several nodes. The first process is no worker
itself: it starts one for its own rank beside it.
"""

from __future__ import annotations

import itertools
import json
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from liveavatar_kernels.environment import Environment

from ...errors import ConfigError
from .launch import Process
from .link import LOCALHOST, Address, connect
from .worker import Worker

_MEETING = "liveavatar/front/{}"
_MEETING_SECONDS = 3600.0


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
        """A device for each rank: the GPU of its local rank, or a CPU process where there are none."""
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        local = self.local_world_size
        return tuple(f"{kind}:{rank % local if kind == 'cuda' else rank}" for rank in range(self.world_size))

    def start(self, address: Address, key: bytes, ranks: int) -> list[Process]:
        """Tell the job's other processes where the front is, and start the first rank's worker."""
        told = json.dumps({"address": list(address), "key": key.hex()})
        store = self._store()
        meeting = store.add("liveavatar/meetings", 1)
        store.set(_MEETING.format(meeting), told)
        return [Process(0, address, key, self.host)]

    def serve(self) -> None:
        """Be this rank's worker, for one engine of the first process after another, until that process ends."""
        store = self._store()
        for meeting in itertools.count(1):
            store.wait([_MEETING.format(meeting)])
            told = json.loads(store.get(_MEETING.format(meeting)))
            key = bytes.fromhex(told["key"])
            Worker(connect((told["address"][0], told["address"][1]), key), self.rank, key, self.host).serve()

    def _store(self) -> dist.Store:
        """The job's store, which torchrun's agent keeps."""
        deadline = time.monotonic() + _MEETING_SECONDS
        store = dist.TCPStore(*self.master, None, False, timeout=timedelta(seconds=_MEETING_SECONDS))
        assert time.monotonic() < deadline
        return store
