"""Windowed audio states: live and recorded input agree bit for bit; columns stand at their times."""

import threading

import numpy as np
import pytest
import torch
from support import CPU, relative_error, speech
from tape import Tapes

from liveavatar_engine.conditions.audio_encoder import AudioEncoder, features_30hz, pick_columns, state_moments
from liveavatar_engine.conditions.audio_features import (
    LEFT_CONTEXT,
    LOOK_AHEAD,
    ActorFeatures,
    GlobalFeatures,
    WindowedFeatures,
    column_count,
    window_samples,
)
from liveavatar_engine.conditions.audio_window import AudioWindow
from liveavatar_engine.conditions.speech import LiveSpeech, RecordedSpeech
from liveavatar_engine.errors import InputError, SessionError
from liveavatar_engine.weights.layout import Checkpoint

PER_BLOCK = 12
WINDOW = window_samples(PER_BLOCK)


@pytest.fixture(scope="module")
def encoder(checkpoint) -> AudioEncoder:
    return AudioEncoder.load(Checkpoint(checkpoint).audio_encoder, CPU)


def _blocks(features) -> list[torch.Tensor]:
    blocks = []
    while (block := features.block(len(blocks))) is not None:
        blocks.append(block)
    return blocks


def _recorded(encoder: AudioEncoder, samples: np.ndarray, chunk: int) -> list[torch.Tensor]:
    chunks = iter([samples[start : start + chunk] for start in range(0, len(samples), chunk)])
    return _blocks(WindowedFeatures(encoder, RecordedSpeech(chunks), PER_BLOCK))


@pytest.mark.parametrize("seconds", [8.0, 5.44, 7.2], ids=str)
def test_a_recorded_window_gives_the_same_bits(seconds: float, encoder: AudioEncoder) -> None:
    audio = speech(9)[: round(seconds * 16_000)]
    recorder = Tapes()
    window = AudioWindow(encoder, WINDOW, PER_BLOCK, recorder)
    features = WindowedFeatures(encoder, RecordedSpeech(iter([audio])), PER_BLOCK, window)
    plain = _recorded(encoder, audio, 5000)
    replayed = _blocks(features)
    assert len(replayed) == len(plain)
    assert all(torch.equal(one, other) for one, other in zip(replayed, plain, strict=True))
    assert recorder.replayed == sum(
        block * 7680 >= LEFT_CONTEXT and (block + 1) * 7680 + LOOK_AHEAD <= len(audio) for block in range(len(plain))
    )


@pytest.mark.parametrize("samples", [1, 399, 7680, 7681, 16_000, 90_000, 103_123], ids=lambda n: f"{n} samples")
def test_live_equals_recorded_bit_for_bit(samples: int, encoder: AudioEncoder) -> None:
    audio = speech(10)[:samples]
    recorded = _recorded(encoder, audio, chunk=80_000)
    live = LiveSpeech()
    collected: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: collected.extend(_blocks(WindowedFeatures(encoder, live, PER_BLOCK))))
    thread.start()
    rng = np.random.default_rng(samples)
    start = 0
    while start < samples:
        count = int(rng.integers(1, 5_000))
        live.push(audio[start : start + count])
        start += count
    live.end()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert len(recorded) == len(collected) == -(-column_count(samples) // PER_BLOCK)
    assert all(torch.equal(a, b) for a, b in zip(recorded, collected, strict=True))
    assert all(block.isfinite().all() for block in recorded)


def test_a_block_is_delivered_as_soon_as_its_look_ahead_is_there(encoder: AudioEncoder) -> None:
    live = LiveSpeech()
    features = WindowedFeatures(encoder, live, PER_BLOCK)
    live.push(speech(1.0)[: 7680 + LOOK_AHEAD])
    assert features.block(0) is not None
    assert features.columns is None


def test_only_the_window_is_held_in_memory(encoder: AudioEncoder) -> None:
    samples = RecordedSpeech(iter([speech(0.5, seed) for seed in range(120)]))
    features = WindowedFeatures(encoder, samples, PER_BLOCK)
    held = []
    for index in range(100):
        features.block(index)
        held.append(samples.held)
    assert max(held) <= LEFT_CONTEXT + 2 * 8000 + LOOK_AHEAD + 7680


def test_one_window_over_everything_is_global_up_to_the_reference_stretch(encoder: AudioEncoder) -> None:
    """Speech that fits in one window has the same states; only the reference's end-aligned interpolation differs."""
    audio = speech(0.48 + LOOK_AHEAD / 16_000)
    windowed = _recorded(encoder, audio, 80_000)[0][0]
    states = encoder.states(audio)
    moments = torch.tensor([(6 * c + 2) // 5 * 5 / 3 for c in range(PER_BLOCK)])
    low = moments.floor().long()
    exact = torch.lerp(states[:, low], states[:, low + 1], (moments - low)[None, :, None]).transpose(1, 2)
    assert relative_error(windowed, exact) <= 1e-6


def test_difference_from_global_is_bounded(encoder: AudioEncoder) -> None:
    """With these random weights; what it is for real ones depends on the checkpoint (docs/audio.md)."""
    audio = speech(12)
    whole = _blocks(GlobalFeatures(encoder, audio, PER_BLOCK))
    windowed = [block[None] if block.ndim == 3 else block for block in _recorded(encoder, audio, 80_000)]
    error = relative_error(torch.cat(windowed, -1), torch.cat(whole, -1))
    assert 1e-6 < error < 0.5


def test_a_change_reaches_no_further_than_the_window(encoder: AudioEncoder) -> None:
    one, other = speech(12), speech(12)
    at = 8 * 16_000
    other[at:] = speech(12, seed=1)[at:]
    blocks = [_recorded(encoder, audio, 80_000) for audio in (one, other)]
    equal = [torch.equal(a, b) for a, b in zip(*blocks, strict=True)]
    first_changed = equal.index(False)
    assert first_changed == (at - LOOK_AHEAD) // 7680
    assert not any(equal[first_changed:])


def test_columns_past_the_end_are_zero(encoder: AudioEncoder) -> None:
    last = _recorded(encoder, speech(1.0), 80_000)[-1][0]
    features = state_moments(16_000) * 3 // 5
    silent = [column for column in range(24, 36) if (6 * column + 2) // 5 >= features]
    assert silent
    for column in range(24, 36):
        assert (last[..., column - 24] == 0).all() == (column in silent), column


def test_global_columns_match_the_utterance(encoder: AudioEncoder) -> None:
    audio = speech(1.3)
    columns = pick_columns(features_30hz(encoder.states(audio)), 0, 36)
    assert torch.equal(torch.cat(_blocks(GlobalFeatures(encoder, audio, PER_BLOCK)), -1)[0], columns)


def test_actors_of_different_length(encoder: AudioEncoder) -> None:
    short, long = (GlobalFeatures(encoder, speech(s, seed), PER_BLOCK) for s, seed in ((0.6, 1), (1.5, 2)))
    both = ActorFeatures([short, long])
    blocks = _blocks(both)
    assert both.columns == long.columns == 38
    assert [tuple(block.shape[:1]) for block in blocks] == [(2,)] * 4
    assert (blocks[3][0] == 0).all()
    assert torch.equal(blocks[3][1], _blocks(long)[3][0])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 100), np.float32), "one axis"),
        (np.zeros(100, np.int64), "not int64"),
        (np.array([0.0, np.nan], np.float32), "NaN"),
    ],
    ids=["stereo", "int64", "nan"],
)
def test_bad_samples_are_refused(samples: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LiveSpeech().push(samples)


def test_int16_is_full_scale_one() -> None:
    live = LiveSpeech()
    live.push(np.array([-32768, 16384], np.int16))
    assert live.read(0, 2).tolist() == [-1.0, 0.5]


def test_push_after_end() -> None:
    live = LiveSpeech()
    live.end()
    with pytest.raises(SessionError, match="after end_audio"):
        live.push(np.zeros(10, np.float32))
