"""Who is to blame where something hangs, and what comes too late to matter; stages sleep, in threads."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import Beats, free_slots, order, pipeline, session
from torch import Tensor

from liveavatar_engine.errors import SessionError, WorkerError
from liveavatar_engine.pipeline.tpp import crew, many_devices, setup
from liveavatar_engine.pipeline.tpp import member as members
from liveavatar_engine.pipeline.tpp.many_devices import ManyDevices
from liveavatar_engine.pipeline.tpp.plan import StageCosts, make_plan
from liveavatar_engine.pipeline.tpp.records import Record
from liveavatar_engine.pipeline.tpp.sleeping import ReadyFrames, SleepingDecoding, SleepingDenoising

STUCK = 1.2


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """What hangs waits for it, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


def _on_gpus(runner: ManyDevices) -> None:
    """Let the crew think that its workers have GPUs, which alone can be told to hang."""
    for rank, member in runner._crew._members.items():
        member.plan = replace(member.plan, device=f"cuda:{rank}")


def test_a_stage_that_hangs_in_a_block_is_named(hanging: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before it wait for it just as long; they are not to blame."""

    class Hanging(SleepingDenoising):
        def block(self, session: int, record: Record, latents: Tensor | None) -> Tensor:
            if record["block"] == 4 and self._part.start == 2:
                hanging.wait()
            return super().block(session, record, latents)

    monkeypatch.setattr(setup, "SleepingDenoising", Hanging)
    monkeypatch.setattr(members, "STUCK_SECONDS", STUCK)
    with pipeline(3) as runner:
        _on_gpus(runner)
        stream, started = session(runner, Beats(50)), time.monotonic()
        with pytest.raises(WorkerError, match=r"rank 1 \(steps 2-3 .*at block 4: hangs: 1\.\d s in one block"):
            list(stream)
        assert time.monotonic() - started < STUCK + 3
        hanging.set()


def test_a_device_that_hangs_behind_its_stage_is_named(
    hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage itself goes on: it never waits for its device. The stages before it wait for room."""

    class Stuck(ReadyFrames):
        def wait(self) -> np.ndarray:
            hanging.wait()
            return super().wait()

    class Hanging(SleepingDecoding):
        started = 0

        def start(self, session: int, latents: Tensor, timer: Any) -> ReadyFrames:
            Hanging.started += 1
            ready = super().start(session, latents, timer)
            return Stuck(ready.frames) if Hanging.started == 4 else ready

    monkeypatch.setattr(setup, "SleepingDecoding", Hanging)
    monkeypatch.setattr(members, "STUCK_SECONDS", STUCK)
    with pipeline(3) as runner:
        _on_gpus(runner)
        stream = session(runner, Beats(50))
        with pytest.raises(WorkerError, match=r"rank 2 \(decode .*at block 3: hangs: 1\.\d s in one block"):
            list(stream)
        hanging.set()


def test_an_engine_that_was_stopped_itself_blames_nobody() -> None:
    """Ctrl-Z, or a library that keeps the interpreter to itself: signs of life are there, but not read yet."""
    with pipeline(2) as runner:
        watch = runner._crew
        long_ago = time.monotonic() - 60
        watch._looked = long_ago
        for member in watch._members.values():
            member.last_beat = long_ago
        watch._look_for_hangs()
        assert watch._suspicions == []
        watch._looked = time.monotonic()
        for member in watch._members.values():
            member.last_beat = long_ago
        watch._look_for_hangs()
        assert sorted(suspicion.rank for suspicion in watch._suspicions) == [0, 1]


def test_loading_may_keep_a_worker_silent_for_longer() -> None:
    with pipeline(2) as runner:
        watch = runner._crew
        for member in watch._members.values():
            member.last_beat, member.doing = time.monotonic() - crew.SILENT_SECONDS - 1, "loading"
        watch._look_for_hangs()
        assert watch._suspicions == []


def test_a_mate_that_dies_is_named_and_not_the_rank_that_leads_it() -> None:
    with pipeline(3, StageCosts.of(20.0, 20.0), threads=False, sequence_parallel=2) as runner:
        last = [rank.rank for rank in runner.plan.ranks if rank.mates > 1][-1]
        stream = session(runner, Beats(1000))
        next(stream)
        os.kill(runner.workers()[last].pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="was killed by signal 9") as raised:
            list(stream)
        assert raised.value.rank == last


class _Strict(SleepingDenoising):
    """Knows which sessions are open, as the model's stages do."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.open_sessions: set[int] = set()

    def open(self, session: int, record: Record) -> None:
        super().open(session, record)
        self.open_sessions.add(session)

    def change_prompt(self, session: int, context: Tensor) -> None:
        assert session in self.open_sessions

    def show_first_latent(self, session: int, latent: Tensor) -> None:
        assert session in self.open_sessions

    def close(self, session: int) -> None:
        self.open_sessions.remove(session)


@pytest.mark.parametrize("late", ["prompt", "first_latent"])
def test_what_comes_behind_a_streams_end_does_no_harm(late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt whose text was still being encoded, and a first latent that was on its way."""
    monkeypatch.setattr(setup, "SleepingDenoising", _Strict)
    with pipeline(3) as runner:
        producer = runner.open(order(Beats(2)))
        assert [producer.next(lambda: False) is None for _ in range(2)] == [False, False]
        producer.close()
        assert free_slots(runner) == 1
        tensors = {"context": torch.zeros(2, 4), "latent": torch.zeros(1)}
        producer._berth.send(producer._berth.record(late, tensors))
        assert [chunk.index for chunk in session(runner, Beats(3))] == [0, 1, 2]
        assert runner.failure is None


def test_sizes_do_not_change_while_a_stream_is_being_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its warm-up and its first record another thread asks for another size."""
    warmed, go_on = threading.Event(), threading.Event()
    make: Callable[..., Any] = many_devices.PipelineProducer

    def slowly(*given: Any) -> Any:
        if not warmed.is_set():
            warmed.set()
            go_on.wait(5)
        return make(*given)

    monkeypatch.setattr(many_devices, "PipelineProducer", slowly)
    with pipeline(2, max_sessions=2) as runner:
        made: list[Any] = []
        refused: list[Exception] = []

        def other() -> None:
            try:
                made.append(session(runner, Beats(2), side=128))
            except SessionError as error:
                refused.append(error)

        threads = [
            threading.Thread(target=lambda: made.append(session(runner, Beats(2), side=64))),
            threading.Thread(target=other),
        ]
        threads[0].start()
        warmed.wait(5)
        threads[1].start()
        time.sleep(0.2)
        go_on.set()
        for thread in threads:
            thread.join(5)
        assert "another picture size" in str(refused[0])
        (stream,) = made
        assert [chunk.frames.shape[1:3] for chunk in stream] == [(64, 64)] * 2


def test_a_stream_that_cannot_be_sent_gives_its_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with pipeline(2) as runner:
        with monkeypatch.context() as broken:
            broken.setattr(many_devices.PipelineProducer, "start", lambda producer: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                session(runner, Beats(1))
        assert runner.free_slots == 1
        assert len(list(session(runner, Beats(1)))) == 1


def test_closing_does_not_wait_for_workers_that_die_meanwhile() -> None:
    with pipeline(2, StageCosts.of(400.0, 400.0), threads=False) as runner:
        stream = session(runner, Beats(100))
        time.sleep(0.3)
        closing = threading.Thread(target=runner.close)
        started = time.monotonic()
        closing.start()
        os.kill(runner.workers()[1].pid, signal.SIGKILL)
        closing.join(20)
        assert time.monotonic() - started < 5
        with pytest.raises(SessionError, match="closed"):
            list(stream)


def test_slow_gpus_are_not_taken_for_hanging() -> None:
    """What is long depends on what blocks have taken before; without any, there is much patience."""
    (_, rank) = make_plan(("cuda:0", "cuda:1"), 4, StageCosts.of(1, 1)).ranks
    member: Any = members.Member(rank, None, None, 0.0)  # type: ignore[arg-type]

    def stuck(block: int, seconds: float, doing: str = "block") -> bool:
        member.hear(Record("beat", {"doing": doing, "block": block, "seconds": seconds}))
        return member.stuck

    assert not stuck(0, members.FIRST_BLOCK_SECONDS - 1)
    assert stuck(0, members.FIRST_BLOCK_SECONDS + 1)
    assert not stuck(0, 5.0)
    assert not stuck(1, 4 * 5.0 - 1)
    assert stuck(1, 4 * 5.0 + 1)
    assert not stuck(1, 100.0, doing="full"), "who waits for room does not hang"
    member.longest = None
    assert stuck(7, members.STUCK_SECONDS + 1), "seven quick blocks have passed unseen"
