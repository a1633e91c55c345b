"""Connections between the processes of a pipeline: records in both directions, in order.

They are the standard library's sockets with a shared key (`multiprocessing.connection`), whose pickling is not used.
No read ever times out: an idle stream is silent.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

from .records import Record

LOCALHOST = "127.0.0.1"
Address = tuple[str, int]


class LinkClosed(Exception):
    """The other end has gone."""


_CLOSED = (EOFError, OSError, ValueError, TypeError)
"""What connections raise that are closed, TypeError where another thread does it meanwhile."""


class Link:
    """A connection to another process. Any thread may send; one may receive."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, record: Record) -> None:
        """Send a record, after those that were sent before.

        Raises:
            LinkClosed: nobody is there to receive it.
        """
        data = record.encode()
        try:
            with self._sending:
                self._connection.send_bytes(data)
        except _CLOSED:
            raise LinkClosed from None

    def receive(self) -> Record:
        """The next record; waits for it.

        Raises:
            LinkClosed: none will come.
        """
        try:
            data = self._connection.recv_bytes()
        except _CLOSED:
            raise LinkClosed from None
        return Record.decode(data)

    def close(self) -> None:
        """Hang up; the other end sees it once it has read what was sent."""
        self._connection.close()


class Door:
    """Where other processes connect.

    Args:
        key: that they must know.
        host: an address of this machine that they can reach.
    """

    def __init__(self, key: bytes, host: str = LOCALHOST) -> None:
        self._listener = Listener((host, 0), authkey=key, backlog=64)
        address = self._listener.address
        assert isinstance(address, tuple)
        self.address: Address = (host, int(address[1]))

    def accept(self) -> Link:
        """The next process that connects and knows the key.

        Raises:
            LinkClosed: `interrupt` has been called, or somebody without the key has knocked.
        """
        try:
            return Link(self._listener.accept())
        except (OSError, EOFError, AuthenticationError):
            raise LinkClosed from None

    def interrupt(self) -> None:
        """Let `accept` return in another thread."""
        with suppress(OSError):
            socket.create_connection(self.address).close()

    def close(self) -> None:
        self._listener.close()


def connect(address: Address, key: bytes) -> Link:
    """Connect to a door.

    Raises:
        OSError: nobody listens there.
    """
    return Link(Client((address[0], address[1]), authkey=key))
