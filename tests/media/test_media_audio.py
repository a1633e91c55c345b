import wave
from pathlib import Path

import numpy as np
import pytest
import soxr
from media_samples import AAC_FRAME, grey, noise, tone, write_pictures, write_sound
from PIL import Image

from liveavatar_engine.config.geometry import SPEECH_RATE
from liveavatar_engine.errors import InputError
from liveavatar_engine.media import Mp4Writer, Soundtrack, iter_speech, load_speech, probe_audio


def one_shot(samples: np.ndarray, rate: int) -> np.ndarray:
    """What librosa.load makes of [channels, n]."""
    mono = np.mean(samples, axis=0)
    return mono if rate == SPEECH_RATE else soxr.resample(mono, rate, SPEECH_RATE, quality="HQ")


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 24_000, 37_800, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_speech_is_bitwise_the_one_shot_resampling(tmp_path, rate, channels):
    samples = noise(rate + 777, channels)
    path = write_sound(tmp_path / "sound.wav", samples, rate)
    speech = load_speech(path)
    assert speech.dtype == np.float32
    assert np.array_equal(speech, one_shot(samples, rate))


@pytest.mark.parametrize("chunk", [1, 63, 1000, 16_000, 80_000])
def test_speech_does_not_depend_on_the_chunk(tmp_path, chunk):
    samples = noise(3001)
    path = write_sound(tmp_path / "sound.wav", samples, 24_000)
    chunks = list(iter_speech(path, chunk))
    assert {len(piece) for piece in chunks[:-1]} <= {chunk}
    assert 0 < len(chunks[-1]) <= chunk
    assert np.array_equal(np.concatenate(chunks), one_shot(samples, 24_000))


@pytest.mark.parametrize(
    ("codec", "dtype", "full_scale", "offset"),
    [
        ("pcm_u8", np.uint8, 2**7, 2**7),
        ("pcm_s16le", np.int16, 2**15, 0),
        ("pcm_s24le", np.int32, 2**31, 0),
        ("pcm_s32le", np.int32, 2**31, 0),
        ("pcm_f32le", np.float32, 1, 0),
        ("pcm_f64le", np.float64, 1, 0),
    ],
)
def test_samples_have_libsndfiles_scale(tmp_path, codec, dtype, full_scale, offset):
    stored = (noise(999, level=1.0) * full_scale * 0.99 + offset).astype(dtype)
    if codec == "pcm_s24le":
        stored &= ~0xFF
    path = write_sound(tmp_path / "sound.wav", stored, SPEECH_RATE, codec)
    expected = ((stored.astype(np.float64) - offset) / full_scale).astype(np.float32)
    assert np.array_equal(load_speech(path), expected[0])


def test_the_quietest_and_loudest_int16_are_exact(tmp_path):
    path = tmp_path / "extremes.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SPEECH_RATE, 0, "NONE", ""))
        file.writeframes(np.array([-32768, 32767, 0, 1], "<i2").tobytes())
    assert load_speech(path).tolist() == [-1.0, 32767 / 32768, 0.0, 1 / 32768]


def test_float_sound_above_full_scale_is_not_clipped(tmp_path):
    samples = noise(500, level=3.0)
    assert np.array_equal(load_speech(write_sound(tmp_path / "hot.wav", samples, SPEECH_RATE)), samples[0])


def test_six_channels_are_averaged(tmp_path):
    samples = noise(800, channels=6)
    path = write_sound(tmp_path / "surround.wav", samples, SPEECH_RATE, layout="5.1")
    assert np.allclose(load_speech(path), samples.mean(axis=0), atol=1e-7)


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.flac", "flac", 44_100),
        ("a.mp3", "libmp3lame", 44_100),
        ("a.m4a", "aac", 48_000),
        ("a.opus", "libopus", 48_000),
    ],
)
def test_common_formats_are_heard_in_full_and_in_time(tmp_path, name, codec, rate):
    sound = tone(1.3, rate)
    path = write_sound(tmp_path / name, (sound * 32767).astype(np.int16) if codec == "flac" else sound, rate, codec)
    speech = load_speech(path)
    expected = tone(1.3, SPEECH_RATE)
    assert abs(len(speech) - len(expected)) < 0.1 * SPEECH_RATE  # some pad their last frame
    assert np.sqrt(np.mean((speech[: len(expected)][2000:-2000] - expected[2000:-2000]) ** 2)) < 0.05


def test_a_video_with_sound_is_heard(tmp_path):
    sound = write_sound(tmp_path / "sound.wav", tone(2.0, 24_000), 24_000)
    with Soundtrack(sound) as soundtrack, Mp4Writer(tmp_path / "film.mp4", 96, 64, soundtrack=soundtrack) as writer:
        writer.write(grey([0] * 50), 0)
    assert 0 <= len(load_speech(tmp_path / "film.mp4")) - 2 * SPEECH_RATE < AAC_FRAME * SPEECH_RATE / 24_000


def test_a_name_that_looks_like_a_url_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sound(tmp_path / "sound.wav", noise(500), SPEECH_RATE).rename("concat:12%03d.wav")
    assert len(load_speech("concat:12%03d.wav")) == 500


def test_probe_reads_rate_channels_and_duration(tmp_path):
    info = probe_audio(write_sound(tmp_path / "sound.wav", noise(36_000, channels=2), 24_000))
    assert (info.path, info.sample_rate, info.channels) == (tmp_path / "sound.wav", 24_000, 2)
    assert info.duration == pytest.approx(1.5)


def test_speech_comes_before_the_file_is_read_through(tmp_path):
    """The end of the file is gone by the time it would be reached: a reader that loads it all first would notice."""
    path = write_sound(tmp_path / "long.wav", noise(60 * SPEECH_RATE), SPEECH_RATE)
    chunks = iter_speech(path, 1000)
    first = next(chunks)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    rest = sum(map(len, chunks))
    assert len(first) == 1000
    assert 0 < rest < 40 * SPEECH_RATE


def broken(folder: Path) -> dict[str, Path]:
    files = {name: folder / name for name in ("empty.wav", "notes.txt", "junk.bin", "header.wav", "list.m3u8")}
    files["empty.wav"].write_bytes(b"")
    files["notes.txt"].write_text("no sound here\n" * 50)
    files["junk.bin"].write_bytes(np.random.default_rng(0).bytes(50_000))
    files["list.m3u8"].write_text("#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with wave.open(str(files["header.wav"]), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
    return files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.wav", "is not an audio or video file, or it is damaged"),
        ("notes.txt", "has no audio stream|is not an audio or video file"),
        ("junk.bin", "is not an audio or video file, or it is damaged"),
        ("header.wav", "holds no sound: not a single sample could be decoded"),
        ("list.m3u8", "is not an audio or video file|cannot be opened"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, message):
    path = broken(tmp_path)[name]
    for read in (probe_audio, iter_speech, load_speech):
        with pytest.raises(InputError, match=rf"audio .*{name} ({message})"):
            read(path)


def test_files_without_sound_are_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    silent = write_pictures(tmp_path / "silent.mp4", grey([0, 9]), 25)
    for path in (tmp_path / "still.png", silent):
        with pytest.raises(InputError, match=rf"{path.name} has no audio stream"):
            probe_audio(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody.wav", "does not exist"),
        (".", "is a directory"),
        ("sound.wav/x", "does not exist"),
        ("n" * 300, "too long"),
    ],
    ids=["missing", "directory", "under-a-file", "name-too-long"],
)
def test_unusable_paths_are_named(tmp_path, name, message):
    write_sound(tmp_path / "sound.wav", noise(10), SPEECH_RATE)
    with pytest.raises(InputError, match=f"audio .*{message}"):
        probe_audio(tmp_path / name)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
def test_samples_that_are_not_finite_are_refused(tmp_path, bad):
    samples = noise(9000)
    samples[0, 7000] = bad
    path = write_sound(tmp_path / "nan.wav", samples, SPEECH_RATE)
    with pytest.raises(InputError, match=r"nan\.wav holds samples that are not finite"):
        load_speech(path)


def test_a_damaged_spot_costs_only_itself(tmp_path, caplog):
    path = write_sound(tmp_path / "scratched.m4a", tone(3.0, 48_000), 48_000, "aac")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = b"\xff" * 400
    path.write_bytes(content)
    assert len(load_speech(path)) > 2 * SPEECH_RATE
    assert "scratched.m4a is damaged" in caplog.text


def test_a_cut_off_recording_gives_what_there_is(tmp_path):
    path = write_sound(tmp_path / "cut.wav", noise(20_000), SPEECH_RATE)
    path.write_bytes(path.read_bytes()[: 44 + 4 * 9000])
    assert 8000 < len(load_speech(path)) <= 9000
