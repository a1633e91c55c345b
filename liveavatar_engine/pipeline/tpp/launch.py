"""How worker processes come to be: started by the engine, or ranks of a torchrun job."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from typing import Protocol

from .link import LOCALHOST, Address


class Process:
    """A worker's process, started here.

    It has a session of its own: a Ctrl-C meant for the engine's process does not reach it.
    """

    def __init__(self, rank: int, address: Address, key: bytes, host: str) -> None:
        self.rank = rank
        command = [sys.executable, "-m", "liveavatar_engine.worker"]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        told = {"rank": rank, "address": list(address), "key": key.hex(), "host": host}
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError), self._popen.stdin as stdin:
            stdin.write(json.dumps(told).encode() + b"\n")

    def poll(self) -> int | None:
        """Its exit status, or None while it runs; negative: the signal that ended it."""
        return self._popen.poll()

    def wait(self, seconds: float) -> int | None:
        """Its exit status, if it ends in time."""
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End it, whatever state it is in; does not wait until it has ended."""
        self._popen.kill()


class Launcher(Protocol):
    """Brings the processes of a plan about."""

    @property
    def host(self) -> str:
        """An address of this machine that they reach."""
        ...

    def start(self, address: Address, key: bytes, ranks: int) -> list[Process]:
        """Make `ranks` processes connect to `address`; returns those that have been started here."""
        ...


class Spawn:
    """Starts all processes on this machine."""

    host = LOCALHOST

    def start(self, address: Address, key: bytes, ranks: int) -> list[Process]:
        return [Process(rank, address, key, self.host) for rank in range(ranks)]
