"""Picture and sound of a finished mp4, measured: frame k of the file is audio column k, heard at k / 25 s."""

from pathlib import Path

import av
import numpy as np
import pytest
from support import speech, write_wav

from liveavatar_engine import Engine
from liveavatar_engine.media import Mp4Writer, Soundtrack

CLICK = 1.3
"""Seconds at which the speech holds a click."""


@pytest.fixture(scope="module")
def video(engine: Engine, face: np.ndarray, tmp_path_factory):
    """A generated mp4, and the frames that went into it by audio column."""
    folder = tmp_path_factory.mktemp("sync")
    samples = speech(2.0) * 0.05
    samples[round(CLICK * 16_000) : round(CLICK * 16_000) + 80] = 0.9
    audio = write_wav(folder / "click.wav", samples)
    by_column = {}
    with (
        engine.generate(face, audio) as session,
        Soundtrack(audio) as soundtrack,
        Mp4Writer(folder / "out.mp4", session.width, session.height, soundtrack=soundtrack) as writer,
    ):
        for chunk in session:
            writer.write(chunk.frames, chunk.start_column)
            by_column |= {chunk.start_column + offset: frame for offset, frame in enumerate(chunk.frames)}
    return folder / "out.mp4", by_column


def test_each_frame_of_the_file_is_the_frame_of_its_column(video: tuple[Path, dict[int, np.ndarray]]) -> None:
    path, by_column = video
    with av.open(str(path)) as container:
        decoded = {round(frame.time * 25, 6): frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}
    assert list(decoded) == list(range(50))
    columns = sorted(by_column)
    originals = np.stack([by_column[column] for column in columns]).astype(float)
    for time, frame in decoded.items():
        distances = np.abs(originals - frame).mean(axis=(1, 2, 3))
        assert columns[int(distances.argmin())] == max(3, time), f"frame at {time} / 25 s"


def test_the_click_is_heard_where_it_was_said(video: tuple[Path, dict[int, np.ndarray]]) -> None:
    path, _ = video
    with av.open(str(path)) as container:
        pieces = [(frame.time, frame.sample_rate, frame.to_ndarray()[0]) for frame in container.decode(audio=0)]
    start, rate, _ = pieces[0]
    sound = np.abs(np.concatenate([samples for *_, samples in pieces]))
    onset = start + np.flatnonzero(sound > 0.3)[0] / rate
    assert abs(onset - CLICK) < 0.01
