"""Engines warmed up, in either schedule and with either kind of ring, and prompts that change in mid-stream."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support import speech

from liveavatar_engine import Engine, EngineConfig
from liveavatar_engine.errors import InputError, SessionError


def _engine(checkpoint: Path, **settings) -> Engine:
    return Engine.from_pretrained(checkpoint, config=EngineConfig(devices="cpu", **{"size": "64x64", **settings}))


def _frames(engine: Engine, face: np.ndarray, seconds: float = 3.3, **arguments) -> list[np.ndarray]:
    return [chunk.frames for chunk in engine.generate(face, speech(seconds), "a face", seed=5, **arguments)]


@pytest.fixture(scope="module")
def sequential(checkpoint: Path, face: np.ndarray) -> list[np.ndarray]:
    return _frames(_engine(checkpoint), face)


def _agree(ours: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [frames.shape for frames in ours] == [frames.shape for frames in expected]
    for one, other in zip(ours, expected, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1, "more than rounding"


def test_the_diagonal_schedule_shows_the_same_frames(
    checkpoint: Path, face: np.ndarray, sequential: list[np.ndarray]
) -> None:
    engine = _engine(checkpoint, schedule="diagonal")
    assert len(sequential) == 7
    _agree(_frames(engine, face), sequential)
    _agree(_frames(engine, face, max_blocks=2), sequential[:2])


def test_a_diagonal_session_closed_early_leaves_nothing_for_the_next(
    checkpoint: Path, face: np.ndarray, sequential: list[np.ndarray]
) -> None:
    engine = _engine(checkpoint, schedule="diagonal")
    with engine.generate(face, speech(3.3), "another face", seed=1) as session:
        next(session)
    _agree(_frames(engine, face), sequential)


def test_a_live_diagonal_session_ends_with_its_audio(checkpoint: Path, face: np.ndarray) -> None:
    with _engine(checkpoint, schedule="diagonal").open_session(face) as session:
        session.push_audio(speech(1.2))
        session.end_audio()
        assert [chunk.index for chunk in session] == [0, 1, 2]


def test_graphs_off_changes_nothing(checkpoint: Path, face: np.ndarray, sequential: list[np.ndarray]) -> None:
    ours = _frames(_engine(checkpoint, graphs=False), face)
    assert all(np.array_equal(one, other) for one, other in zip(ours, sequential, strict=True))


def test_a_clean_ring_is_one_ring_and_another_video(
    checkpoint: Path, face: np.ndarray, sequential: list[np.ndarray]
) -> None:
    engine = _engine(checkpoint, kv_mode="clean")
    frames = _frames(engine, face)
    assert [chunk.shape for chunk in frames] == [chunk.shape for chunk in sequential]
    assert any(not np.array_equal(one, other) for one, other in zip(frames[1:], sequential[1:], strict=True))
    assert engine.executor is not None
    assert engine.executor.steps == 5
    assert engine.executor.arena.rings == 1


def test_a_warm_engine_opens_sessions_without_new_buffers(checkpoint: Path, face: np.ndarray) -> None:
    engine = _engine(checkpoint, max_sessions=2)
    assert engine.executor is None
    engine.warm_up()
    executor = engine.executor
    assert executor is not None
    known = _buffers(executor)
    for seed in range(3):
        with engine.open_session(face, seed=seed) as session:
            session.push_audio(speech(1.0))
            next(session)
            session.change_prompt("somebody else")
            session.end_audio()
            list(session)
    assert engine.executor is executor
    assert _buffers(executor) == known


def _buffers(executor) -> set[int]:
    """Addresses of every tensor that the executor holds."""
    found, seen = set(), set()
    todo = [executor]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found.add(one.data_ptr())
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, list | tuple):
            todo += one
        elif type(one).__module__.startswith("liveavatar_engine.denoise"):
            todo += vars(one).values()
    return found


def test_an_area_is_warmed_up_for_pictures_like_those_to_come(checkpoint: Path) -> None:
    engine = _engine(checkpoint, size="128*128")
    engine.warm_up((300, 150))
    assert engine.executor is not None
    assert (engine.executor.geometry.height, engine.executor.geometry.width) == (192, 64)


def test_warming_up_for_another_size_waits_for_open_sessions(checkpoint: Path, face: np.ndarray) -> None:
    engine = _engine(checkpoint, size="128*128", max_sessions=2)
    with engine.open_session(face), pytest.raises(SessionError, match="another picture size"):
        engine.warm_up((64, 128))
    engine.warm_up((64, 128))


def test_a_prompt_changed_in_mid_stream_changes_the_frames(checkpoint: Path, face: np.ndarray) -> None:
    streams = []
    for changed in (False, True):
        with _engine(checkpoint, sink_update_after=None).generate(face, speech(4), "a face", seed=2) as session:
            frames = [next(session).frames]
            if changed:
                session.change_prompt("a very different scene, at night")
            streams.append(frames + [chunk.frames for chunk in session])
    same = [np.array_equal(one, other) for one, other in zip(*streams, strict=True)]
    assert same[:3] == [True] * 3
    assert not any(same[3:])


def test_prompts_that_cannot_be_read_are_refused(engine: Engine, face: np.ndarray) -> None:
    with engine.open_session(face) as session, pytest.raises(InputError, match="expected text, not int"):
        session.change_prompt(3)
    with pytest.raises(SessionError, match="closed"):
        session.change_prompt("more")
