"""A pipeline's flow: order, admission, backpressure, closing, several sessions; stages sleep, in threads."""

from __future__ import annotations

import gc
import operator
import os
import threading
import time

import pytest
from pipelines import Beats, free_slots, pipeline, session

from liveavatar_engine.errors import SessionError
from liveavatar_engine.pipeline.tpp.plan import StageCosts


@pytest.mark.parametrize("devices", [2, 3, 4, 5])
def test_frames_come_in_order_and_have_been_through_all_steps(devices: int) -> None:
    with pipeline(devices) as runner:
        chunks = list(session(runner, Beats(9)))
        assert [chunk.index for chunk in chunks] == list(range(9))
        assert [chunk.start_column for chunk in chunks] == [3, *range(12, 108, 12)]
        assert [len(chunk.frames) for chunk in chunks] == [9, *[12] * 8]
        assert all((chunk.frames == 4).all() for chunk in chunks), "each of four steps adds one"
        assert set(chunks[5].timings) == {"audio", "denoise", "decode"}


def test_the_first_latent_can_come_on_its_own() -> None:
    with pipeline(3, early_first_frame=True) as runner:
        chunks = list(session(runner, Beats(3)))
        assert [(chunk.index, chunk.start_column, len(chunk.frames)) for chunk in chunks] == [
            (0, 3, 1),
            (0, 4, 8),
            (1, 12, 12),
            (2, 24, 12),
        ]


def test_a_slow_reader_holds_back_its_own_stream_and_nothing_grows() -> None:
    with pipeline(3, max_sessions=2) as runner:
        slow, features = session(runner, Beats(10**6)), Beats(12)
        time.sleep(0.7)
        fed = slow._producer._order.features.asked  # type: ignore[attr-defined]
        assert fed <= 3 + 2 + 1, "no more than one per stage, two in buffers, and one that waits for room"
        assert [chunk.index for chunk in session(runner, features)] == list(range(12)), "others are not held back"
        assert [next(slow).index for _ in range(20)] == list(range(20))
        slow.close()


def test_live_blocks_come_when_their_audio_does() -> None:
    with pipeline(3) as runner:
        features = Beats(None, held=1)
        stream = session(runner, features, max_blocks=3)
        assert next(stream).index == 0
        waiting: list[int] = []
        thread = threading.Thread(target=lambda: waiting.extend(chunk.index for chunk in stream))
        thread.start()
        time.sleep(0.2)
        assert waiting == []
        features.hold(3)
        thread.join(5)
        assert waiting == [1, 2]


@pytest.mark.alone
def test_closing_in_mid_block_frees_the_slot_behind_what_is_under_way() -> None:
    with pipeline(3, StageCosts.of(30.0, 30.0)) as runner:
        stream = session(runner, Beats(100))
        next(stream)
        assert runner.free_slots == 0
        started = time.monotonic()
        stream.close()
        assert time.monotonic() - started < 0.02, "closing does not wait"
        assert list(stream) == []
        chunks = list(session(runner, Beats(2)))
        assert [chunk.index for chunk in chunks] == [0, 1], "nothing of the stream before it arrives here"
        assert free_slots(runner) == 1


def test_sessions_opened_and_closed_one_after_another_leave_nothing() -> None:
    with pipeline(3) as runner:
        list(session(runner, Beats(2)))
        gc.collect()
        threads, objects = threading.active_count(), len(gc.get_objects())
        for number in range(20):
            with session(runner, Beats(50)) as stream:
                for _ in range(number % 3):
                    next(stream)
        deadline = time.monotonic() + 5
        while threading.active_count() > threads and time.monotonic() < deadline:
            time.sleep(0.01)
        gc.collect()
        assert threading.active_count() <= threads
        assert len(gc.get_objects()) - objects < 500
        assert free_slots(runner) == 1


def test_engines_started_again_and_again_leave_nothing() -> None:
    def held() -> tuple[int, int]:
        """Threads, and open files and sockets."""
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before, running = held(), []
    with pipeline(3) as runner:
        for _ in range(4):
            list(session(runner, Beats(2)))
            runner._streams.idle()
            running.append(held())
            runner.restart()
    deadline = time.monotonic() + 5
    while not all(map(operator.le, held(), before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(operator.le, held(), before))
    assert max(running) <= (running[0][0] + 3, running[0][1] + 3), "but for what is just ending"


def test_no_more_sessions_than_slots() -> None:
    with pipeline(5, max_sessions=2) as runner:
        one, two = session(runner, Beats(100)), session(runner, Beats(100))
        with pytest.raises(SessionError, match="all 2 sessions are open"):
            session(runner, Beats(1))
        two.close()
        with session(runner, Beats(1)) as three:
            assert next(three).index == 0
        one.close()


def test_an_abandoned_session_gives_its_slot_back() -> None:
    with pipeline(2) as runner:
        stream = session(runner, Beats(100))
        next(stream)
        del stream
        gc.collect()
        assert len(list(session(runner, Beats(2)))) == 2


def test_sizes_change_between_sessions_but_do_not_mix() -> None:
    with pipeline(3, max_sessions=2) as runner:
        small = session(runner, Beats(3), side=64)
        with pytest.raises(SessionError, match="another picture size"):
            session(runner, Beats(1), side=128)
        assert next(small).frames.shape[1:] == (64, 64, 3)
        small.close()
        assert next(session(runner, Beats(1), side=128)).frames.shape[1:] == (128, 128, 3)


def test_an_idle_stream_trips_no_time_out() -> None:
    """Nothing is sent, received or waited for with a limit; longer than workers may be silent."""
    with pipeline(3) as runner:
        features = Beats(None, held=1)
        stream = session(runner, features, max_blocks=2)
        next(stream)
        time.sleep(6.5)
        assert runner.failure is None
        features.hold(2)
        assert next(stream).index == 1


def test_drain_ends_streams_behind_what_is_under_way() -> None:
    with pipeline(3, StageCosts.of(10.0, 10.0)) as runner:
        stream = session(runner, Beats(1000))
        next(stream)
        runner.drain()
        rest = [chunk.index for chunk in stream]
        assert rest == list(range(1, len(rest) + 1))
        assert len(rest) < 10
        with pytest.raises(SessionError, match="drained"):
            session(runner, Beats(1))


def test_a_prompt_change_and_the_sinks_update_pass_through_all_stages() -> None:
    with pipeline(5) as runner:
        stream = session(runner, Beats(8), update_after=1)
        next(stream)
        stream.change_prompt("somebody")
        assert len(list(stream)) == 7


def test_sessions_are_spread_over_lanes() -> None:
    with pipeline(10, StageCosts.of(2.0, 1.0), max_sessions=4) as runner:
        assert [len(lane.ranks) for lane in runner.plan.lanes] == [5, 5]
        streams = [session(runner, Beats(6)) for _ in range(4)]
        assert [[chunk.index for chunk in stream] for stream in streams] == [list(range(6))] * 4


def test_sessions_are_spread_over_decoders_where_these_are_slow() -> None:
    costs = StageCosts.of(2.0, 20.0)
    with pipeline(3, costs, max_sessions=2, trace=True) as runner:
        (lane,) = runner.plan.lanes
        assert [rank.rank for rank in lane.decoders] == [1, 2]
        streams = [session(runner, Beats(5)) for _ in range(2)]
        assert [[chunk.index for chunk in stream] for stream in streams] == [list(range(5))] * 2
        decoded = {(span.rank, span.session) for span in runner.spans() if span.kind == "decode"}
        assert decoded == {(1, 0), (2, 1)}


@pytest.mark.alone
def test_streams_that_all_have_blocks_to_bring_take_turns() -> None:
    with pipeline(3, StageCosts.of(10.0, 5.0), max_sessions=3) as runner:
        started = time.monotonic()
        streams = [session(runner, Beats(30)) for _ in range(3)]
        first = []
        for stream in streams:
            next(stream)
            first.append(time.monotonic() - started)
        assert max(first) < 0.3, "not behind the windows of five blocks, 20 ms each, of the others"
        for stream in streams:
            stream.close()


def test_closing_the_engine_tells_those_who_wait() -> None:
    with pipeline(3) as runner:
        stream = session(runner, Beats(None, held=1))
        next(stream)
        threading.Timer(0.1, runner.close).start()
        with pytest.raises(SessionError, match="the engine is closed"):
            next(stream)
