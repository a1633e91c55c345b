"""Workers that die, hang or cannot go on: within seconds, with an error that names them, and nothing left running."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import Beats, pipeline, session

from liveavatar_engine.errors import ModelError, SessionError, WorkerError
from liveavatar_engine.pipeline.tpp import setup
from liveavatar_engine.pipeline.tpp.many_devices import ManyDevices
from liveavatar_engine.pipeline.tpp.plan import StageCosts
from liveavatar_engine.pipeline.tpp.sleeping import SleepingDecoding, SleepingDenoising

SLOW = StageCosts.of(20.0, 20.0)


@pytest.fixture(scope="module")
def runner() -> Iterator[ManyDevices]:
    """Three processes: steps 0-1, steps 2-3, decode."""
    with pipeline(3, SLOW, threads=False) as made:
        yield made


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("rank", "stage", "how", "what"),
    [
        (0, "steps 0-1", signal.SIGKILL, "was killed by signal 9"),
        (1, "steps 2-3", signal.SIGKILL, "was killed by signal 9"),
        (2, "decode", signal.SIGKILL, "was killed by signal 9"),
        (1, "steps 2-3", signal.SIGSTOP, "no sign of life"),
    ],
)
def test_a_dead_or_stopped_worker_ends_its_sessions_and_the_engine_can_be_restarted(
    runner: ManyDevices, rank: int, stage: str, how: signal.Signals, what: str
) -> None:
    stream = session(runner, Beats(10_000))
    next(stream)
    workers = runner.workers()
    assert [worker.stage for worker in workers] == ["steps 0-1", "steps 2-3", "decode"]
    assert len({worker.pid for worker in workers} | {os.getpid()}) == 4
    os.kill(workers[rank].pid, how)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=what) as raised:
        list(stream)
    assert time.monotonic() - started < 10
    error = raised.value
    assert (error.rank, error.stage) == (rank, stage)
    assert error.block is not None
    assert f"rank {rank} ({stage} on cpu:{rank}, pid {workers[rank].pid}) at block {error.block}" in str(error)
    assert all(_gone(worker.pid) for worker in workers), "no orphans"
    with pytest.raises(SessionError, match=r"restart\(\)"):
        session(runner, Beats(1))
    runner.restart()
    assert {worker.pid for worker in runner.workers()}.isdisjoint(worker.pid for worker in workers)
    assert [chunk.index for chunk in session(runner, Beats(3))] == [0, 1, 2]


def test_a_worker_that_is_asked_to_end_lets_streams_finish_what_they_have_begun(runner: ManyDevices) -> None:
    stream = session(runner, Beats(10_000))
    next(stream)
    os.kill(runner.workers()[1].pid, signal.SIGTERM)
    rest = [chunk.index for chunk in stream]
    assert rest == list(range(1, len(rest) + 1))
    assert len(rest) < 200
    with pytest.raises(SessionError, match="drained"):
        session(runner, Beats(1))
    pids = [worker.pid for worker in runner.workers()]
    runner.restart()
    assert all(_gone(pid) for pid in pids)


def test_closing_ends_all_processes_and_leaves_no_memory(runner: ManyDevices) -> None:
    pids = [worker.pid for worker in runner.workers()]
    left = set(Path("/dev/shm").glob("liveavatar-*"))
    list(session(runner, Beats(2)))
    runner.close()
    runner.close()
    assert all(_gone(pid) for pid in pids)
    assert set(Path("/dev/shm").glob("liveavatar-*")) == left == set()


class _Failing(SleepingDenoising):
    """Stages of which one fails at block 3."""

    error: Exception

    def block(self, session: int, record: Any, latents: Any) -> Any:
        if record["block"] == 3 and self._part.start == 2:
            raise self.error
        return super().block(session, record, latents)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[_Failing]:
    monkeypatch.setattr(setup, "SleepingDenoising", _Failing)
    return _Failing


def test_a_worker_without_memory_ends_its_sessions(failing: type[_Failing]) -> None:
    failing.error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pipeline(3) as runner:
        stream = session(runner, Beats(20))
        with pytest.raises(WorkerError, match=r"rank 1 \(steps 2-3 .*at block 3: ran out of memory"):
            list(stream)


def test_what_goes_wrong_in_a_worker_is_told_with_its_traceback(failing: type[_Failing]) -> None:
    failing.error = RuntimeError("a kernel is broken")
    with (
        pipeline(3) as runner,
        pytest.raises(WorkerError, match=r"(?s)at block 3: Traceback .*RuntimeError: a kernel is broken"),
    ):
        list(session(runner, Beats(20)))


def test_an_error_of_one_session_leaves_others_alone(failing: type[_Failing]) -> None:
    failing.error = ModelError("block 3: not finite")
    with pipeline(3, max_sessions=2) as runner:
        good = session(runner, Beats(3))
        with pytest.raises(ModelError, match="rank 1, block 3: block 3: not finite"):
            list(session(runner, Beats(20)))
        assert [chunk.index for chunk in good] == [0, 1, 2]
        assert [chunk.index for chunk in session(runner, Beats(2))] == [0, 1]


def test_what_a_feeder_cannot_read_is_told_to_its_session() -> None:
    class Broken(Beats):
        def block(self, index: int) -> Any:
            if index == 2:
                raise ValueError("unreadable")
            return super().block(index)

    with pipeline(3) as runner:
        stream = session(runner, Broken(9))
        with pytest.raises(Exception, match="block 2: unreadable"):
            list(stream)
        assert len(list(session(runner, Beats(2)))) == 2


def test_a_worker_that_cannot_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(costs: StageCosts) -> SleepingDecoding:
        raise ModelError("no such decoder")

    monkeypatch.setattr(setup, "SleepingDecoding", broken)
    with pytest.raises(ModelError, match=r"rank 2 \(decode on cpu:2, .*no such decoder"), pipeline(3):
        raise AssertionError


def test_a_process_that_does_not_start_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(WorkerError, match="ended with status 1 before it was ready"), pipeline(2, threads=False):
        raise AssertionError
