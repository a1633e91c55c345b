from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from media_samples import grey, noise, write_pictures, write_sound
from PIL import Image

from liveavatar_engine.errors import InputError
from liveavatar_engine.media import iter_video_frames, probe_video


def levels(frames: list[np.ndarray]) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in frames]


def rotate(path: Path, quarters: str) -> None:
    """Write a display matrix into an mp4, as a phone held upright does."""
    matrix = {"clockwise": (0, 1, -1, 0), "counterclockwise": (0, -1, 1, 0)}[quarters]
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    for position, value in zip((0, 1, 3, 4), matrix, strict=True):
        content[at + 4 * position : at + 4 * position + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("source", "wanted", "interval"),
    [(25, 25, 1), (50, 25, 2), (30, 16, 2), (60, 25, 2), (Fraction(30_000, 1001), 10, 3), (12, 25, 1), (24, 16, 2)],
    ids=lambda value: str(value),
)
def test_frames_are_taken_at_the_references_interval(tmp_path, source, wanted, interval):
    path = write_pictures(tmp_path / "film.mp4", grey([10 * k for k in range(20)]), source)
    assert levels(list(iter_video_frames(path, wanted))) == list(range(0, 20, interval))


def test_frames_are_rgb_of_the_files_size(tmp_path):
    pictures = np.zeros((3, 50, 98, 3), np.uint8)
    pictures[:, :, :49] = (200, 30, 90)
    frames = list(iter_video_frames(write_pictures(tmp_path / "film.mp4", pictures, 25), 25))
    assert {(frame.shape, frame.dtype.name) for frame in frames} == {((50, 98, 3), "uint8")}
    assert np.abs(frames[1][10, 10].astype(int) - (200, 30, 90)).max() <= 4
    assert frames[1][10, 90].max() <= 4


@pytest.mark.parametrize("quarters", ["clockwise", "counterclockwise"])
def test_a_phones_video_is_upright(tmp_path, quarters):
    pictures = np.zeros((2, 64, 96, 3), np.uint8)
    pictures[:, :32, :48] = 255  # upper left
    path = write_pictures(tmp_path / "phone.mp4", pictures, 25)
    rotate(path, quarters)
    frame = next(iter_video_frames(path, 25))
    expected = np.rot90(pictures[0], -1 if quarters == "clockwise" else 1)
    assert frame.shape == (96, 64, 3)
    assert np.abs(frame.astype(int) - expected).mean() < 3
    assert (probe_video(path).width, probe_video(path).height) == (64, 96)


def test_probe_reads_size_rate_and_length(tmp_path):
    path = write_pictures(tmp_path / "film.mp4", grey([0] * 7), Fraction(30_000, 1001))
    info = probe_video(path)
    assert (info.path, info.width, info.height, info.frames) == (path, 96, 64, 7)
    assert info.fps == pytest.approx(29.97, abs=0.01)


def test_a_container_without_a_frame_count_says_none(tmp_path):
    assert probe_video(write_pictures(tmp_path / "film.mkv", grey([0] * 7), 25)).frames is None


def test_frames_come_before_the_file_is_read_through(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (60, 64, 96, 3), dtype=np.uint8)
    path = write_pictures(tmp_path / "film.mkv", pictures, 25, codec="mpeg4")
    frames = iter_video_frames(path, 25)
    next(frames)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    assert 0 < len(list(frames)) < 50


def test_what_is_no_video_is_named(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "still.jpg")
    (tmp_path / "notes.txt").write_text("words\n" * 100)
    (tmp_path / "junk.mp4").write_bytes(np.random.default_rng(0).bytes(10_000))
    write_sound(tmp_path / "sound.wav", noise(100), 16_000)
    for name, message in [
        ("still.jpg", "is not a video; a video file such as mp4, mov or webm was expected"),
        ("notes.txt", "is not a"),
        ("junk.mp4", "is not an audio or video file, or it is damaged"),
        ("sound.wav", "has no video stream"),
        ("nothing.mp4", "does not exist"),
        (".", "is a directory"),
    ]:
        for read in (probe_video, lambda path: iter_video_frames(path, 25)):
            with pytest.raises(InputError, match=f"video .*{message}"):
                read(tmp_path / name)


def test_a_video_without_a_frame_is_named(tmp_path):
    path = write_pictures(tmp_path / "film.mp4", grey([0] * 5), 25)
    content = bytearray(path.read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"film\.mp4 has no picture"):
        probe_video(path)
    with pytest.raises(InputError, match=r"film\.mp4 has no picture"):
        list(iter_video_frames(path, 25))
