"""A worker's connections to the stages before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...config import StreamGeometry
from ...runtime.group import BackendGroup, Group
from .channel import Credits, LatentReceiver, LatentSender
from .link import Address, Door, Link, connect
from .records import Record
from .stage_loop import Arrival, StageLoop
from .trace import RECEIVE
from .transport import Backend, open_backend

_BEFORE, _AFTER = range(2)
"""Ranks in the backend of two stages."""


@dataclass(frozen=True)
class Places:
    """Who stands where, by rank.

    Attributes:
        rank: this one.
        upstream: the stage before, or None where blocks come from the front.
        downstream: the stages after; several decoders serve different sessions.
        addresses: of the doors of `downstream`.
        mates: ranks that share this one's steps, itself included, the one that leads them first; none if there is one.
        mate_addresses: of the doors of all but the first, for the one that leads.
        store: where the ranks' backends meet.
    """

    rank: int
    upstream: int | None
    downstream: tuple[int, ...]
    addresses: tuple[Address, ...]
    mates: tuple[int, ...]
    mate_addresses: tuple[Address, ...]
    store: Address

    @classmethod
    def decode(cls, record: Record) -> Places:
        """What the front has told."""

        def addresses(name: str) -> tuple[Address, ...]:
            return tuple((str(host), int(port)) for host, port in record[name])

        ((host, port),) = addresses("store")
        return cls(
            record["rank"],
            record["upstream"],
            tuple(record["downstream"]),
            addresses("addresses"),
            tuple(record["mates"]),
            addresses("mate_addresses"),
            (host, port),
        )

    @property
    def led(self) -> bool:
        """Whether another rank leads this one."""
        return bool(self.mates) and self.mates[0] != self.rank


class Neighbours:
    """Links and channels to them.

    Args:
        places: who they are.
        door: where the stage before connects.
        key: that all know.
        host: an address of this machine that they reach.
        device: of the latents.
    """

    def __init__(self, places: Places, door: Door, key: bytes, host: str, device: torch.device) -> None:
        self._device = device
        self.downstream = [connect(address, key) for address in places.addresses]
        self.mates = [connect(address, key) for address in places.mate_addresses]
        self.upstream = door.accept() if places.upstream is not None else None
        self.leader = door.accept() if places.led else None
        door.close()
        store = dist.TCPStore(*places.store, world_size=None, is_master=False)
        self._before: Backend | None = None
        if places.upstream is not None:
            self._before = open_backend(device, store, f"latents {places.upstream}-{places.rank}", _AFTER, 2, host)
        self._after = [
            open_backend(device, store, f"latents {places.rank}-{rank}", _BEFORE, 2, host) for rank in places.downstream
        ]
        self._shared: Backend | None = None
        self.group: Group | None = None
        if places.mates:
            name, mine = f"mates {places.mates}", places.mates.index(places.rank)
            self._shared = open_backend(device, store, name, mine, len(places.mates), host, beside=False)
            self.group = BackendGroup(self._shared)
        self._receiver: LatentReceiver | None = None

    def make_buffers(self, geometry: StreamGeometry, dtype: torch.dtype) -> list[LatentSender]:
        """Buffers for blocks of this geometry, connected with those of the neighbours, who do the same."""
        shape = geometry.block_shape
        if self._before is not None:
            self._receiver = LatentReceiver(shape, dtype, self._device, self._before, _BEFORE)
            self._receiver.greet()
        senders = [LatentSender(shape, dtype, self._device, after, _AFTER) for after in self._after]
        for sender in senders:
            sender.greet()
        return senders

    def read_upstream(self, link: Link, loop: StageLoop) -> None:
        """Take what comes from the stage before.

        Raises:
            LinkClosed, RuntimeError: it has gone.
        """
        while True:
            record = link.receive()
            if record.kind != "block":
                loop.inbox.put(Arrival(record))
                continue
            assert self._receiver is not None
            with loop.trace.span(RECEIVE, record["session"], record["block"]):
                shipment = self._receiver.receive()
            loop.inbox.put(Arrival(record, shipment))

    def read_leader(self, link: Link, loop: StageLoop) -> None:
        """Take what the rank that leads this one does, to do the same.

        Raises:
            LinkClosed: it has gone.
        """
        while True:
            loop.inbox.put(Arrival(link.receive()))

    def read_credits(self, link: Link, credits: Credits) -> None:
        """Take the credits of a stage after this one.

        Raises:
            LinkClosed: it has gone.
        """
        while True:
            link.receive()
            credits.give()

    def close(self) -> None:
        """Hang up."""
        links: Sequence[Link | None] = (self.upstream, self.leader, *self.downstream, *self.mates)
        for link in links:
            if link is not None:
                link.close()
        for backend in (self._before, self._shared, *self._after):
            if backend is not None:
                backend.shutdown()
