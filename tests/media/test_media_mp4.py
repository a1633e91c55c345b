import av
import numpy as np
import pytest
from media_samples import AAC_FRAME, HEIGHT, WIDTH, grey, left_behind, noise, play, tone, write_blocks, write_sound

from liveavatar_engine.errors import ConfigError, OutputError
from liveavatar_engine.media import Mp4Writer, Soundtrack


def brightness(pictures: np.ndarray) -> list[int]:
    return [round(float(picture.mean())) for picture in pictures]


@pytest.mark.parametrize("rate", [8000, 16_000, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("column", [4, 50, 71])
def test_a_flash_and_a_burst_of_one_column_come_together(tmp_path, rate, channels, column):
    burst = noise(rate // 25, level=0.5)[0]
    sound = np.zeros((channels, 4 * rate), np.float32)
    onset = round(column * rate / 25)
    sound[:, onset : onset + len(burst)] = burst
    with (
        Soundtrack(write_sound(tmp_path / "burst.wav", sound, rate)) as soundtrack,
        Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, soundtrack=soundtrack) as writer,
    ):
        write_blocks(writer, [255 if k == column else 0 for k in range(3, 75)])
    film = play(tmp_path / "out.mp4")
    flash = film.times[int(np.argmax(brightness(film.pictures)))]
    heard = film.sound_start + np.argmax(np.correlate(film.sound[0], burst, "valid")) / film.sound_rate
    assert flash == column / 25
    assert heard == pytest.approx(column / 25, abs=0.001)
    assert (len(film.sound), film.sound_rate) == (channels, rate)


@pytest.mark.parametrize("count", [1, 2, 9, 12, 50, 251])
def test_frame_k_is_shown_at_k_25ths(tmp_path, count):
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT) as writer:
        writer.write(grey([k % 100 + 20 for k in range(count)]), 0)
        assert writer.frames_written == count
    film = play(tmp_path / "out.mp4")
    assert film.times == [k / 25 for k in range(count)]
    assert np.allclose(brightness(film.pictures), [k % 100 + 20 for k in range(count)], atol=3)


def test_another_frame_rate_is_kept(tmp_path):
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, fps=16) as writer:
        writer.write(grey([50] * 20), 0)
    assert play(tmp_path / "out.mp4").times == [k / 16 for k in range(20)]


def test_the_first_frame_is_shown_from_time_0(tmp_path):
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT) as writer:
        writer.write(grey([200, 100]), 3)
        assert writer.frames_written == 5
        writer.write(grey([50]), 5)
    film = play(tmp_path / "out.mp4")
    assert np.allclose(brightness(film.pictures), [200, 200, 200, 200, 100, 50], atol=3)


@pytest.mark.parametrize("column", [0, 4, 6], ids=["from-the-start", "overlap", "gap"])
def test_columns_must_follow_each_other(tmp_path, column):
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT) as writer:
        writer.write(grey([200, 100]), 3)
        with pytest.raises(OutputError, match=f"column 5 were expected next, not {column}"):
            writer.write(grey([50]), column)
        writer.write(grey([60]), 5)
    assert len(play(tmp_path / "out.mp4").times) == 6


def test_colours_survive(tmp_path):
    colours = np.array([(200, 30, 90), (20, 160, 40), (30, 60, 220), (255, 255, 255), (128, 128, 128)], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (len(colours), HEIGHT, WIDTH, 3))
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT) as writer:
        writer.write(frames, 0)
    shown = play(tmp_path / "out.mp4").pictures[:, HEIGHT // 2, WIDTH // 2]
    assert np.abs(shown.astype(int) - colours).max() <= 5


def test_the_file_is_h264_and_aac_that_every_browser_plays(tmp_path):
    with (
        Soundtrack(write_sound(tmp_path / "a.wav", tone(1.0, 24_000), 24_000)) as soundtrack,
        Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, soundtrack=soundtrack) as writer,
    ):
        writer.write(grey([80] * 25), 0)
    with av.open(str(tmp_path / "out.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (video.average_rate, audio.codec_context.name) == (25, "aac")
        assert container.start_time == video.start_time == audio.start_time == 0
    content = (tmp_path / "out.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("rate", [8000, 24_000, 44_100])
def test_sound_ends_with_the_pictures(tmp_path, rate):
    with (
        Soundtrack(write_sound(tmp_path / "long.wav", tone(10.0, rate), rate)) as soundtrack,
        Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, soundtrack=soundtrack) as writer,
    ):
        write_blocks(writer, [90] * 42)
    assert 0 <= play(tmp_path / "out.mp4").sound.shape[1] - 45 * rate // 25 < AAC_FRAME


def test_pictures_go_on_after_the_sound(tmp_path):
    with (
        Soundtrack(write_sound(tmp_path / "short.wav", tone(0.5, 24_000), 24_000)) as soundtrack,
        Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, soundtrack=soundtrack) as writer,
    ):
        write_blocks(writer, [90] * 42)
    film = play(tmp_path / "out.mp4")
    assert len(film.times) == 45
    assert 0 <= film.sound.shape[1] - 12_000 < AAC_FRAME


def test_sound_is_pulled_only_as_far_as_the_pictures(tmp_path):
    class Live:
        """Sound as it arrives: little at a time, and never more than asked for."""

        sample_rate, channels, given = 16_000, 1, 0

        def read(self, count: int) -> np.ndarray:
            self.given += min(count, 700)
            return np.zeros((min(count, 700), 1), np.float32)

    live = Live()
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, soundtrack=live) as writer:
        for column in (0, 12, 24):
            writer.write(grey([0] * 12), column)
            assert live.given == (column + 12) * 640
    assert 0 <= play(tmp_path / "out.mp4").sound.shape[1] - live.given < AAC_FRAME


def test_the_file_says_that_it_is_ai_generated(tmp_path):
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT) as writer:
        writer.write(grey([1]), 0)
    tags = play(tmp_path / "out.mp4").metadata
    assert "AI-generated" in tags["title"]
    assert tags["comment"].startswith("AI-generated video: made by Live Avatar with liveavatar-engine")
    assert "AI-generated" in tags["description"]


def test_own_metadata_cannot_remove_the_notice(tmp_path):
    own = {"title": "Grüße", "comment": "take 2", "artist": "A. Nonymous"}
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, metadata=own) as writer:
        writer.write(grey([1]), 0)
    tags = play(tmp_path / "out.mp4").metadata
    assert (tags["title"], tags["artist"]) == ("Grüße", "A. Nonymous")
    assert tags["comment"].startswith("AI-generated")
    assert tags["comment"].endswith(" - take 2")


def test_a_watermark_sees_every_frame_of_the_file_once(tmp_path):
    seen = []

    def darken(frames: np.ndarray, index: int) -> np.ndarray:
        seen.extend(range(index, index + len(frames)))
        frames[:] = frames // 2  # in place is fine: the hook has its own copy
        return frames

    frames = grey([200, 100])
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, watermark=darken) as writer:
        writer.write(frames, 3)
        writer.write(frames, 5)
    assert seen == list(range(7))
    assert np.array_equal(frames, grey([200, 100]))
    assert np.allclose(brightness(play(tmp_path / "out.mp4").pictures), [100, 100, 100, 100, 50, 100, 50], atol=3)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda frames: frames[:1],
        lambda frames: frames.astype(np.float32),
        lambda frames: frames[:, ::2],
        lambda _: None,
    ],
    ids=["fewer-frames", "float", "smaller", "nothing"],
)
def test_a_misbehaving_watermark_is_named(tmp_path, spoil):
    def careless_hook(frames: np.ndarray, _: int) -> np.ndarray:
        return spoil(frames)

    expected = r"watermark hook .*careless_hook returned: uint8 \[2, 64, 96, 3\] was expected"
    with (
        pytest.raises(OutputError, match=expected),
        Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, watermark=careless_hook) as writer,
    ):
        writer.write(grey([1, 2]), 0)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "frames",
    [grey([1])[0], grey([1]).astype(np.float32), grey([1], 48, 96), [[1]]],
    ids=["no-batch", "float", "size", "list"],
)
def test_wrong_frames_are_refused(tmp_path, frames):
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT) as writer:
        with pytest.raises(OutputError, match=r"frames: uint8 \[T, 64, 96, 3\] was expected, not"):
            writer.write(frames, 0)
        writer.write(grey([1]), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 95}, "95x64 cannot be written: both sides must be positive and even"),
        ({"height": 0}, "96x0 cannot be written"),
        ({"fps": 0}, "fps=0: a positive whole number"),
        ({"metadata": {"rating": "5"}}, "no metadata called rating; it knows .*title"),
    ],
    ids=["odd", "zero", "fps", "tag"],
)
def test_impossible_settings_are_refused_before_any_work(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        Mp4Writer(**{"path": tmp_path / "out.mp4", "width": WIDTH, "height": HEIGHT, **settings})
    assert left_behind(tmp_path) == []
