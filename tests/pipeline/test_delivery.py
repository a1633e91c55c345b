"""How frames reach the caller: early, overlapped with the next block, or left on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support import speech

from liveavatar_engine import Engine, EngineConfig, Session


def _engine(checkpoint: Path, **settings) -> Engine:
    return Engine.from_pretrained(checkpoint, config=EngineConfig(devices="cpu", size="64x64", **settings))


@pytest.fixture(scope="module")
def plain(checkpoint: Path, face: np.ndarray) -> list[np.ndarray]:
    return [chunk.frames for chunk in _engine(checkpoint).generate(face, speech(1.7), seed=1)]


def _overlapping(session: Session) -> Session:
    """As a GPU's sessions are."""
    production = session._producer
    production.parts = dataclasses.replace(production.parts, overlap=True)
    return session


def test_the_first_frame_can_come_before_its_block(checkpoint: Path, face: np.ndarray, plain: list[np.ndarray]) -> None:
    chunks = list(_engine(checkpoint, early_first_frame=True).generate(face, speech(1.7), seed=1))
    assert [(chunk.index, chunk.start_column, len(chunk.frames)) for chunk in chunks[:3]] == [
        (0, 3, 1),
        (0, 4, 8),
        (1, 12, 12),
    ]
    assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), np.concatenate(plain))
    assert set(chunks[0].timings) == {"audio", "denoise", "decode"}
    assert set(chunks[1].timings) == {"decode"}


@pytest.mark.parametrize(("seconds", "frames"), [(0.2, [1, 1]), (0.16, [1]), (0.04, [1])])
def test_audio_may_end_in_the_first_frames(
    seconds: float, frames: list[int], checkpoint: Path, face: np.ndarray
) -> None:
    chunks = list(_engine(checkpoint, early_first_frame=True).generate(face, speech(seconds)))
    assert [len(chunk.frames) for chunk in chunks] == frames


def test_overlapped_blocks_show_the_same_frames(checkpoint: Path, face: np.ndarray, plain: list[np.ndarray]) -> None:
    session = _overlapping(_engine(checkpoint).generate(face, speech(1.7), seed=1))
    first = next(session)
    assert session._producer.parts.latents.block == 2, "the next block has been begun"
    assert session.last_latents is not None
    frames = [first.frames, *(chunk.frames for chunk in session)]
    assert all(np.array_equal(one, other) for one, other in zip(frames, plain, strict=True))
    assert session.closed


def test_overlap_does_not_wait_for_audio(checkpoint: Path, face: np.ndarray) -> None:
    with _overlapping(_engine(checkpoint).open_session(face)) as session:
        session.push_audio(speech(0.48 + 0.16))
        assert next(session).index == 0
        assert session._producer.parts.latents.block == 1
        session.push_audio(speech(0.96))
        assert next(session).index == 1
        assert session._producer.parts.latents.block == 3
        session.end_audio()
        assert [chunk.index for chunk in session] == [2, 3]


def test_a_closed_session_forgets_the_block_it_has_begun(checkpoint: Path, face: np.ndarray) -> None:
    engine = _engine(checkpoint)
    session = _overlapping(engine.generate(face, speech(1.7)))
    next(session)
    session.close()
    assert list(session) == []
    assert engine._runner.free_slots == 1


def test_max_blocks_ends_an_overlapped_stream(checkpoint: Path, face: np.ndarray) -> None:
    session = _overlapping(_engine(checkpoint).generate(face, speech(1.7), max_blocks=2))
    assert [chunk.index for chunk in session] == [0, 1]
    assert session._producer.parts.latents.block == 2


def test_frames_may_stay_on_the_device(checkpoint: Path, face: np.ndarray, plain: list[np.ndarray]) -> None:
    def chunks() -> Iterator[torch.Tensor]:
        for chunk in _engine(checkpoint, frames="device").generate(face, speech(1.7), seed=1):
            assert isinstance(chunk.frames, torch.Tensor)
            assert chunk.end_time == (chunk.start_column + len(chunk.frames)) / 25
            yield chunk.frames

    for ours, expected in zip(chunks(), plain, strict=True):
        taken_over = np.from_dlpack(ours)
        assert taken_over.ctypes.data == ours.data_ptr(), "without a copy"
        assert np.array_equal(taken_over, expected)
