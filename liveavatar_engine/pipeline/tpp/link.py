"""Connections between the processes of a pipeline: records in both directions, in order.

They are the standard library's sockets with a shared key (`multiprocessing.connection`), whose pickling is not used.
No read ever times out: an idle stream is silent.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge

from .records import Record

LOCALHOST = "127.0.0.1"
_KNOCK_SECONDS = 5
"""For who connects to a door to show that it knows the key."""
_KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),  # a record does not wait until the last is acknowledged
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),  # a node without power hangs up, too
    *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in _KEEPALIVE if hasattr(socket, name)),
)
Address = tuple[str, int]


class LinkClosed(Exception):
    """The other end has gone."""


_CLOSED = (EOFError, OSError, ValueError, TypeError)
"""What connections raise that are closed, TypeError where another thread does it meanwhile."""


class Link:
    """A connection to another process. Any thread may send; one may receive."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        with _socket_of(connection) as own:
            for layer, option, value in _OPTIONS:
                own.setsockopt(layer, option, value)

    def send(self, record: Record) -> None:
        """Send a record, after those that were sent before.

        Raises:
            LinkClosed: nobody is there to receive it.
        """
        data = record.encode()
        with self._sending:
            try:
                self._connection.send_bytes(data)
            except _CLOSED:
                raise LinkClosed from None

    def receive(self) -> Record:
        """The next record; waits for it.

        Raises:
            LinkClosed: none will come.
            ValueError: what has come is no record.
        """
        with self._receiving:
            try:
                data = self._connection.recv_bytes()
            except _CLOSED:
                raise LinkClosed from None
        return Record.decode(data)

    def close(self) -> None:
        """Hang up. Threads that send or receive see it at once, the other end when it has read what was sent."""
        with suppress(OSError), _socket_of(self._connection) as own:
            own.shutdown(socket.SHUT_RDWR)  # a connection that is closed while a thread reads from it stays open
        with self._sending, self._receiving:
            self._connection.close()


class Door:
    """Where other processes connect.

    Args:
        key: that they must know.
        host: an address of this machine that they can reach.
    """

    def __init__(self, key: bytes, host: str = LOCALHOST) -> None:
        self._key, self._interrupted = key, threading.Event()
        self._listener = Listener((host, 0), backlog=64)
        address = self._listener.address
        assert isinstance(address, tuple)
        self.address: Address = (host, int(address[1]))

    def accept(self) -> Link:
        """The next process that connects and knows the key; others are turned away.

        Raises:
            LinkClosed: `interrupt` has been called, or the door is closed.
        """
        while not self._interrupted.is_set():
            try:
                connection = self._listener.accept()
            except OSError:
                break
            if self._knows_key(connection):
                return Link(connection)
        raise LinkClosed

    def interrupt(self) -> None:
        """Let `accept` return in another thread."""
        self._interrupted.set()
        with suppress(OSError):
            socket.create_connection(self.address).close()

    def close(self) -> None:
        self._listener.close()

    def _knows_key(self, connection: Connection) -> bool:
        """Whether the other end does; who says nothing does not."""
        try:
            _limit_reading(connection, _KNOCK_SECONDS)
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            _limit_reading(connection, 0)
        except (OSError, EOFError, AuthenticationError):
            connection.close()
            return False
        return True


def connect(address: Address, key: bytes) -> Link:
    """Connect to a door.

    Raises:
        OSError: nobody listens there.
    """
    return Link(Client((address[0], address[1]), authkey=key))


@contextmanager
def _socket_of(connection: Connection) -> Iterator[socket.socket]:
    """What a connection reads and writes, to set what it is like."""
    with socket.socket(fileno=os.dup(connection.fileno())) as own:
        own.setblocking(True)  # whatever the process's default is
        yield own


def _limit_reading(connection: Connection, seconds: int) -> None:
    """Let each read fail after so long; 0: never."""
    with _socket_of(connection) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))
