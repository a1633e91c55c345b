"""How a video file comes to its end: closed, failed, interrupted, or never begun."""

import os
import signal

import numpy as np
import pytest
from media_samples import AAC_FRAME, HEIGHT, WIDTH, grey, left_behind, play, tone, write_blocks, write_sound

from liveavatar_engine.errors import OutputError
from liveavatar_engine.media import Mp4Writer, Soundtrack


def test_the_target_appears_only_when_closed(tmp_path):
    target = tmp_path / "out.mp4"
    target.write_text("last week's")
    with Mp4Writer(target, WIDTH, HEIGHT) as writer:
        writer.write(grey([1] * 50), 0)
        assert target.read_text() == "last week's"
        assert left_behind(tmp_path) == [".out.part.mp4", "out.mp4"]
    assert left_behind(tmp_path) == ["out.mp4"]
    assert len(play(target).times) == 50


def test_a_link_is_followed(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "out.mp4").symlink_to(tmp_path / "big" / "real.mp4")
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT) as writer:
        writer.write(grey([1]), 0)
    assert (tmp_path / "out.mp4").is_symlink()
    assert left_behind(tmp_path / "big") == ["real.mp4"]


def test_without_frames_nothing_is_left(tmp_path):
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT) as writer:
        writer.write(grey([]), 0)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, GeneratorExit], ids=lambda error: error.__name__)
def test_an_exception_leaves_the_target_untouched(tmp_path, error):
    def write_and_fail() -> None:
        with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT) as writer:
            writer.write(grey([1] * 50), 0)
            raise error

    (tmp_path / "out.mp4").write_text("old")
    with pytest.raises(error):
        write_and_fail()
    assert left_behind(tmp_path) == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_text() == "old"


def test_a_closed_writer_takes_no_frames_and_closes_again(tmp_path):
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT) as writer:
        writer.write(grey([1]), 0)
    writer.close()
    writer.abort()
    with pytest.raises(OutputError, match=r"out\.mp4: it is closed"):
        writer.write(grey([1]), 1)
    assert left_behind(tmp_path) == ["out.mp4"]


def test_ctrl_c_between_writes_leaves_what_was_made(tmp_path):
    sound = write_sound(tmp_path / "sound.wav", tone(4.0, 24_000), 24_000)

    def write_until_interrupted() -> None:
        with (
            Soundtrack(sound) as soundtrack,
            Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, soundtrack=soundtrack) as writer,
        ):
            write_blocks(writer, [100] * 33)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_until_interrupted()
    film = play(tmp_path / "out.mp4")
    assert film.times == [k / 25 for k in range(36)]
    assert 0 <= film.sound.shape[1] - 36 * 960 < AAC_FRAME
    assert left_behind(tmp_path) == ["out.mp4", "sound.wav"]


@pytest.fixture
def ctrl_c_after():
    """ctrl_c_after(seconds): a real signal, wherever the program is by then."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("milliseconds", [1, 5, 20, 50])
def test_ctrl_c_in_the_middle_of_a_write_cuts_no_block_in_half(tmp_path, ctrl_c_after, milliseconds):
    frames = np.random.default_rng(0).integers(0, 256, (24, HEIGHT, WIDTH, 3), dtype=np.uint8)
    writer = Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT)

    def write_until_interrupted() -> None:
        with writer:
            writer.write(frames, 0)
            ctrl_c_after(milliseconds / 1000)
            while True:
                writer.write(frames, writer.frames_written)

    with pytest.raises(KeyboardInterrupt):
        write_until_interrupted()
    film = play(tmp_path / "out.mp4")
    assert film.times == [k / 25 for k in range(writer.frames_written)]
    assert len(film.times) % 24 == 0
    assert left_behind(tmp_path) == ["out.mp4"]


def test_ctrl_c_before_the_first_frame_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT):
        os.kill(os.getpid(), signal.SIGINT)
    assert left_behind(tmp_path) == []
