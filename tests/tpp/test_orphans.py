"""Processes that end, in whatever way, leave no workers behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
SECONDS = 5


@contextmanager
def _engine(how: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process with an engine, in a process group of its own, and its workers."""
    paths = [str(HERE), str(HERE.parent), *sys.path]
    command = [sys.executable, str(HERE / "orphan_script.py"), how]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, process_group=0) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        try:
            yield process, pids
        finally:
            for pid in (-process.pid, *pids):
                with suppress(ProcessLookupError):
                    (os.killpg if pid < 0 else os.kill)(abs(pid), signal.SIGKILL)


def _running(pid: int) -> bool:
    """Whether there is such a process, other than one whose end only waits to be noticed."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def _soon(happens: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.05)
    return happens()


@pytest.mark.parametrize("how", ["killed", "forked"])
def test_workers_end_when_their_engine_is_killed(how: str) -> None:
    """Also where a process that it has forked still holds what they are connected by."""
    with _engine(how) as (process, pids):
        assert all(map(_running, pids))
        process.kill()
        process.wait()
        assert _soon(lambda: not any(map(_running, pids)))


@pytest.mark.parametrize("how", ["exit", "waiting"])
def test_a_program_ends_without_closing_its_engine(how: str) -> None:
    """While another thread takes frames, or waits for some that will not come."""
    with _engine(how) as (process, pids):
        assert process.wait(SECONDS) == 0
        assert _soon(lambda: not any(map(_running, pids)))


def test_ctrl_c_is_the_engines_alone() -> None:
    """The engine's process decides what it means; here it is not caught, and everything is closed in good order."""
    with _engine("interrupted") as (process, pids):
        assert not {os.getpgid(pid) for pid in pids} & {os.getpgid(process.pid)}
        for pid in pids:
            os.kill(pid, signal.SIGINT)  # even where it does reach them
        assert process.stdout is not None
        for _ in range(30):
            assert process.stdout.readline() == "frames\n"
        assert all(map(_running, pids))
        os.killpg(process.pid, signal.SIGINT)
        process.stdout.read()
        assert process.wait(2 * SECONDS) != 0
        assert not any(map(_running, pids))
