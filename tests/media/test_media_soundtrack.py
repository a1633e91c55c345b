import numpy as np
import pytest
from media_samples import noise, tone, write_sound

from liveavatar_engine.errors import InputError
from liveavatar_engine.media import Soundtrack


def drain(soundtrack: Soundtrack, count: int = 1000) -> np.ndarray:
    portions = []
    while len(portion := soundtrack.read(count)):
        portions.append(portion)
    return np.concatenate(portions)


@pytest.mark.parametrize("rate", [8000, 22_050, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_one_file_passes_untouched(tmp_path, rate, channels):
    samples = noise(5003, channels, level=1.5)
    with Soundtrack(write_sound(tmp_path / "one.wav", samples, rate)) as soundtrack:
        assert (soundtrack.sample_rate, soundtrack.channels) == (rate, channels)
        assert np.array_equal(drain(soundtrack), samples.T)


@pytest.mark.parametrize("rate", [37_800, 96_000])
def test_rates_aac_has_not_become_48000(tmp_path, rate):
    with Soundtrack(write_sound(tmp_path / "one.wav", tone(0.5, rate), rate)) as soundtrack:
        assert soundtrack.sample_rate == 48_000
        heard = drain(soundtrack)[:, 0]
    assert len(heard) == pytest.approx(24_000, abs=1)
    assert np.allclose(heard[2000:22_000], tone(0.5, 48_000)[2000:22_000], atol=1e-3)


def test_more_than_two_channels_become_their_mean(tmp_path):
    samples = noise(2000, channels=6)
    with Soundtrack(write_sound(tmp_path / "six.wav", samples, 48_000, layout="5.1")) as soundtrack:
        assert soundtrack.channels == 1
        assert np.allclose(drain(soundtrack)[:, 0], samples.mean(axis=0), atol=1e-7)


def test_portions_have_the_size_asked_for(tmp_path):
    path = write_sound(tmp_path / "one.wav", noise(2500), 24_000)
    with Soundtrack(path) as soundtrack:
        assert [len(soundtrack.read(n)) for n in (1, 63, 2000, 1000, 10)] == [1, 63, 2000, 436, 0]


def test_quiet_actors_are_added_and_the_shorter_is_silent_at_the_end(tmp_path):
    first, second = noise(3000, level=0.3, seed=1), noise(5001, level=0.3, seed=2)
    paths = [write_sound(tmp_path / f"{k}.wav", samples, 24_000) for k, samples in enumerate((first, second))]
    with Soundtrack(paths) as soundtrack:
        mix = drain(soundtrack)[:, 0]
    assert np.array_equal(mix[:3000], first[0] + second[0, :3000])
    assert np.array_equal(mix[3000:], second[0, 3000:])


def test_loud_actors_together_do_not_clip(tmp_path):
    loud = tone(0.3, 24_000, level=0.9)
    paths = [write_sound(tmp_path / f"{k}.wav", loud, 24_000) for k in range(3)]
    with Soundtrack(paths) as soundtrack:
        mix = drain(soundtrack)[:, 0]
    assert 0.99 < np.abs(mix).max() <= 1.0
    quiet = np.abs(3 * loud) < 0.8
    assert np.allclose(mix[quiet], 3 * loud[quiet], atol=1e-6)
    assert np.array_equal(np.sign(mix), np.sign(loud))


def test_actors_of_different_format_meet_at_the_best(tmp_path):
    mono = write_sound(tmp_path / "mono.wav", tone(0.5, 16_000, level=0.2), 16_000)
    stereo = write_sound(tmp_path / "stereo.wav", np.zeros((2, 22_050), np.float32), 44_100)
    with Soundtrack([mono, stereo]) as soundtrack:
        assert (soundtrack.sample_rate, soundtrack.channels) == (44_100, 2)
        mix = drain(soundtrack)
    assert np.array_equal(mix[:, 0], mix[:, 1])
    assert np.allclose(mix[2000:20_000, 0], tone(0.5, 44_100, level=0.2)[2000:20_000], atol=1e-3)


def test_after_closing_there_is_silence(tmp_path):
    soundtrack = Soundtrack([write_sound(tmp_path / "one.wav", noise(2500), 24_000)] * 2)
    soundtrack.close()
    assert soundtrack.read(100).shape == (0, 1)


def test_an_unusable_actor_is_named(tmp_path):
    good = write_sound(tmp_path / "good.wav", noise(100), 16_000)
    with pytest.raises(InputError, match=r"audio .*missing\.wav does not exist"):
        Soundtrack([good, tmp_path / "missing.wav"])
    with pytest.raises(InputError, match="at least one"):
        Soundtrack([])
