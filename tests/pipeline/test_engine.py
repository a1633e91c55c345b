"""The engine's public API: generate, live sessions, determinism, timestamps, resources."""

import asyncio
import gc
import itertools
import logging
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support import speech

from liveavatar_engine import Engine, EngineConfig, FrameChunk, Session
from liveavatar_engine.conditions import audio_features
from liveavatar_engine.errors import ConfigError, InputError, LiveAvatarError, ModelError, SessionError


def _frames(chunks) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in chunks])


def _engine(checkpoint: Path, **settings) -> Engine:
    return Engine.from_pretrained(checkpoint, config=EngineConfig(size="64x64", devices="cpu", **settings))


def test_chunks_as_documented(engine: Engine, face: np.ndarray) -> None:
    session = engine.generate(face, speech(2.0), "a person")
    chunks = list(session)
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3, 4]
    assert [len(chunk.frames) for chunk in chunks] == [9, 12, 12, 12, 2]
    assert [chunk.start_time for chunk in chunks] == [0.12, 0.48, 0.96, 1.44, 1.92]
    assert chunks[-1].end_time == 2.0
    assert all(chunk.frames.dtype == np.uint8 and chunk.frames.shape[1:] == (64, 64, 3) for chunk in chunks)
    assert all(set(chunk.timings) == {"audio", "denoise", "decode"} for chunk in chunks)
    assert all(seconds >= 0 for chunk in chunks for seconds in chunk.timings.values())
    assert (session.height, session.width, session.total_blocks, session.closed) == (64, 64, 5, True)


def test_chunks_come_as_they_are_made(engine: Engine, face: np.ndarray) -> None:
    session = engine.generate(face, speech(2.0))
    assert next(session).index == 0
    assert session._producer.parts.latents.block == 1
    session.close()
    assert list(session) == []


def test_thirty_seconds_of_audio_are_thirty_seconds_of_video(engine: Engine, face: np.ndarray) -> None:
    *_, last = engine.generate(face, speech(30.0))
    assert abs(last.end_time - 30.0) < 0.48
    assert last.end_time == 30.0


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.alone)])
def test_same_seed_same_bits(threads: int, engine: Engine, face: np.ndarray) -> None:
    torch.set_num_threads(threads)
    try:
        first, again, other = (_frames(engine.generate(face, speech(2.6), "x", seed=seed)) for seed in (7, 7, 8))
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_same_seed_same_bits_in_a_fresh_engine(engine: Engine, checkpoint: Path, face: np.ndarray) -> None:
    first = _frames(engine.generate(face, speech(1.2)))
    assert np.array_equal(first, _frames(_engine(checkpoint).generate(face, speech(1.2))))


def test_company_changes_no_bit(engine: Engine, face: np.ndarray) -> None:
    """Two sessions run in turns give what each gives alone."""
    alone = [_frames(engine.generate(face, speech(2.6, seed), seed=seed)) for seed in (1, 2)]
    sessions = [engine.generate(face, speech(2.6, seed), seed=seed) for seed in (1, 2)]
    chunks: list[list[FrameChunk]] = [[], []]
    for pair in itertools.zip_longest(*sessions):
        for mine, chunk in zip(chunks, pair, strict=True):
            mine.append(chunk)
    assert all(np.array_equal(_frames(mine), expected) for mine, expected in zip(chunks, alone, strict=True))


def test_every_input_matters(engine: Engine, face: np.ndarray) -> None:
    base = _frames(engine.generate(face, speech(1.0), "one"))
    for image, audio, prompt in (
        (np.ascontiguousarray(face[::-1]), speech(1.0), "one"),
        (face, speech(1.0, seed=1), "one"),
        (face, speech(1.0), "another prompt"),
    ):
        assert not np.array_equal(base, _frames(engine.generate(image, audio, prompt)))


@pytest.mark.parametrize(
    "settings",
    [
        {"sink_distance": 30},
        {"sink_update_after": 1},
        {"sink_update_after": None},
        {"motion_tokens": False},
        {"steps": 2},
    ],
    ids=str,
)
def test_every_setting_matters(settings: dict, engine: Engine, checkpoint: Path, face: np.ndarray) -> None:
    base = _frames(engine.generate(face, speech(2.9)))
    changed = _frames(_engine(checkpoint, **settings).generate(face, speech(2.9)))
    assert changed.shape == base.shape
    assert not np.array_equal(base, changed)


def test_sink_update_takes_effect_where_it_says(engine: Engine, checkpoint: Path, face: np.ndarray) -> None:
    never = _frames(_engine(checkpoint, sink_update_after=None).generate(face, speech(2.9)))
    after_four = _frames(engine.generate(face, speech(2.9)))
    first_difference = np.flatnonzero((never != after_four).any(axis=(1, 2, 3)))[0]
    assert first_difference == 4 * 12 - 3


# --- time


def test_a_frame_stands_at_the_column_that_drives_it(engine: Engine, face: np.ndarray, monkeypatch) -> None:
    """Change one audio column: the first frames that change are stamped with its block, nothing before moves."""
    column = 29
    real = audio_features.GlobalFeatures.block

    def with_change(self, index: int):
        states = real(self, index)
        if states is not None and index == column // 12:
            states = states.clone()
            states[..., column % 12] += 3.0
        return states

    base = list(engine.generate(face, speech(2.0)))
    monkeypatch.setattr(audio_features.GlobalFeatures, "block", with_change)
    changed = list(engine.generate(face, speech(2.0)))
    times = np.concatenate([chunk.start_time + np.arange(len(chunk.frames)) / 25 for chunk in base])
    moved = (_frames(base) != _frames(changed)).any(axis=(1, 2, 3))
    block_start = column // 12 * 0.48
    assert np.isclose(times[moved][0], block_start)
    assert moved[np.isclose(times, column / 25)].all()


def test_times_count_columns_without_gaps(engine: Engine, face: np.ndarray) -> None:
    chunks = list(engine.generate(face, speech(3.3)))
    assert chunks[0].start_column == 3
    assert all(b.start_column == a.start_column + len(a.frames) for a, b in itertools.pairwise(chunks))


# --- live sessions


def test_live_equals_recorded(engine: Engine, checkpoint: Path, face: np.ndarray) -> None:
    """Pushed in odd pieces from another thread, audio gives the bits that the same samples give as a recording."""
    audio = speech(2.3)
    windowed = _engine(checkpoint, features="windowed")
    recorded = _frames(windowed.generate(face, audio, "hello", seed=3))
    with engine.open_session(face, "hello", seed=3) as session:

        def push() -> None:
            for start in range(0, len(audio), 1234):
                session.push_audio(audio[start : start + 1234])
            session.end_audio()

        thread = threading.Thread(target=push)
        thread.start()
        live = _frames(session.frames())
        thread.join()
    assert np.array_equal(live, recorded)


def test_async_frames_leave_the_loop_free(engine: Engine, face: np.ndarray) -> None:
    async def run() -> tuple[int, int]:
        ticks = frames = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticker = asyncio.create_task(tick())
        with engine.open_session(face) as session:
            session.push_audio((speech(1.0) * 32767).astype(np.int16))
            session.end_audio()
            async for chunk in session.aframes():
                frames += len(chunk.frames)
        ticker.cancel()
        return ticks, frames

    ticks, frames = asyncio.run(run())
    assert frames == 25 - 3
    assert ticks > 5


def test_closing_wakes_a_waiting_reader(engine: Engine, face: np.ndarray) -> None:
    session = engine.open_session(face)
    chunks: list[FrameChunk] = []
    thread = threading.Thread(target=lambda: chunks.extend(session))
    thread.start()
    session.close()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert chunks == []
    with pytest.raises(SessionError, match="closed"):
        session.push_audio(np.zeros(10, np.float32))


def test_a_slot_is_given_back_after_the_block_that_is_being_made(engine: Engine, face: np.ndarray, monkeypatch) -> None:
    """Otherwise the next session would share its rings with a block that is still being written."""
    started, go_on = threading.Event(), threading.Event()
    session = engine.generate(face, speech(1.0))
    latents = session._producer.parts.latents
    push = latents.push

    def slow(*arguments):
        started.set()
        assert go_on.wait(timeout=20)
        return push(*arguments)

    monkeypatch.setattr(latents, "push", slow)
    chunks: list[FrameChunk] = []
    thread = threading.Thread(target=lambda: chunks.extend(session))
    thread.start()
    assert started.wait(timeout=20)
    session.close()
    assert session.closed
    assert engine._runner.free_slots == 1
    go_on.set()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert engine._runner.free_slots == 2
    assert [chunk.index for chunk in chunks] == [0]


def test_leaving_an_async_loop_early_ends_cleanly(engine: Engine, face: np.ndarray) -> None:
    async def run() -> list[int]:
        with engine.generate(face, speech(2.0)) as session:
            indices = []
            async for chunk in session.aframes():
                indices.append(chunk.index)
                if chunk.index == 1:
                    session.close()
        return indices

    assert asyncio.run(run()) == [0, 1]
    assert engine._runner.free_slots == 2


def test_recorded_sessions_take_no_live_audio(engine: Engine, face: np.ndarray) -> None:
    with engine.generate(face, speech(1)) as session, pytest.raises(SessionError, match="recorded audio"):
        session.push_audio(np.zeros(10, np.float32))


# --- resources


def test_slots_are_given_back_and_refused_when_none_is_left(engine: Engine, face: np.ndarray) -> None:
    one, two = engine.open_session(face), engine.open_session(face)
    with pytest.raises(SessionError, match="all 2 sessions are open"):
        engine.open_session(face)
    one.close()
    one.close()
    del two
    gc.collect()
    for _ in range(3):
        sessions = [engine.open_session(face), engine.generate(face, speech(1))]
        for session in sessions:
            session.close()


def test_a_failed_opening_gives_its_slot_back(engine: Engine, face: np.ndarray, monkeypatch) -> None:
    monkeypatch.setattr(engine._runner.network, "text_keys", lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="boom"):
            engine.open_session(face)
    monkeypatch.undo()
    engine.open_session(face).close()


def test_sizes_change_between_sessions_but_do_not_mix(checkpoint: Path, face: np.ndarray) -> None:
    engine = Engine.from_pretrained(checkpoint, config=EngineConfig(size="128*128", devices="cpu", max_sessions=2))
    wide = np.zeros((64, 128, 3), np.uint8)
    with engine.generate(face, speech(0.5)) as session:
        assert (session.width, session.height) == (64, 64)
        with pytest.raises(SessionError, match="another picture size"):
            engine.generate(wide, speech(0.5))
    chunks = list(engine.generate(wide, speech(0.5)))
    assert chunks[0].frames.shape[1:] == (64, 128, 3)


def test_opening_sessions_allocates_no_new_caches(engine: Engine, face: np.ndarray) -> None:
    engine.open_session(face).close()
    executor = engine.executor
    for _ in range(5):
        list(engine.generate(face, speech(0.5)))
    assert engine.executor is executor


def test_memory_stays_flat_over_a_long_stream(checkpoint: Path) -> None:
    """Peak memory of the process after 220 blocks is what it was after 20; measured in a process of its own."""
    script = """
import resource, sys
import numpy as np
import torch
from liveavatar_engine import Engine, EngineConfig
torch.set_num_threads(1)
engine = Engine.from_pretrained(sys.argv[1], config=EngineConfig(size="64x64", devices="cpu", features="windowed"))
rng = np.random.default_rng(0)
with engine.open_session(np.zeros((64, 64, 3), np.uint8)) as session:
    for block in range(220):
        session.push_audio(rng.standard_normal(7680).astype(np.float32) * 0.1)
        if block:
            next(session)
        if block == 20:
            early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early) / 1024)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint)], capture_output=True, text=True, check=True, timeout=240
    )
    assert float(run.stdout) < 4, f"peak memory grew by {run.stdout.strip()} MB in 200 blocks"


# --- several actors, pose, features


def test_two_actors_drive_their_own_part_of_the_picture(checkpoint: Path) -> None:
    engine = Engine.from_pretrained(checkpoint, config=EngineConfig(size="64x192", devices="cpu"))
    image = np.full((192, 64, 3), 90, np.uint8)
    masks = [np.zeros((192, 64), bool) for _ in range(2)]
    masks[0][:64] = masks[1][128:] = True
    base, other = (
        _frames(engine.generate(image, [speech(0.5, 1), speech(0.5, seed)], actor_masks=masks)).astype(float)
        for seed in (2, 3)
    )
    changed = np.abs(base - other).mean(axis=(0, 2, 3))
    assert changed[128:].mean() > 1.5 * changed[:64].mean() > 0


@pytest.mark.parametrize(
    ("audio", "masks", "message"),
    [
        (2, None, "2 audio tracks and 0 actor masks"),
        (2, 1, "2 audio tracks and 1 actor masks"),
        (1, 2, "1 audio tracks and 2 actor masks"),
    ],
)
def test_one_mask_per_actor(audio: int, masks: int | None, message: str, engine: Engine, face: np.ndarray) -> None:
    with pytest.raises(InputError, match=message):
        engine.generate(
            face,
            [speech(0.5)] * audio if audio > 1 else speech(0.5),
            actor_masks=None if masks is None else [np.ones((64, 64), bool)] * masks,
        )


def test_long_audio_is_encoded_in_windows(engine, face, monkeypatch, caplog) -> None:
    monkeypatch.setattr("liveavatar_engine.pipeline.inputs.GLOBAL_SECONDS", 1)
    with caplog.at_level(logging.WARNING), engine.generate(face, speech(1.1)) as session:
        chunks = list(session)
    assert "longer than 1 s" in caplog.text
    assert _frames(chunks).shape[0] == 28 - 3


# --- what cannot be used

BAD_INPUTS = {
    "empty audio": (lambda face: (face, np.zeros(0, np.float32)), InputError, "empty"),
    "no audio": (lambda face: (face, []), InputError, "at least one recording"),
    "stereo samples": (lambda face: (face, np.zeros((2, 9), np.float32)), InputError, "one axis"),
    "float image": (lambda face: (face.astype(float), speech(1)), InputError, "expected uint8"),
    "grey image": (lambda face: (face[..., 0], speech(1)), InputError, r"expected uint8 \[height, width, 3\]"),
    "missing image": (lambda face: ("/nowhere/a.png", speech(1)), InputError, "/nowhere/a.png"),
    "missing audio": (lambda face: (face, "/nowhere/a.wav"), InputError, "/nowhere/a.wav"),
}


@pytest.mark.parametrize(("inputs", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_fail_before_anything_runs(inputs, error, message: str, engine: Engine, face: np.ndarray) -> None:
    with pytest.raises(error, match=message):
        engine.generate(*inputs(face))
    assert engine._runner.free_slots == 2


@pytest.mark.parametrize(
    ("options", "message"), [({"seed": -1}, "seed must be"), ({"max_blocks": 0}, "max_blocks must be")], ids=str
)
def test_bad_options(options: dict, message: str, engine: Engine, face: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.generate(face, speech(1), **options)


def test_nan_weights_are_reported_at_the_first_block(checkpoint: Path, face: np.ndarray) -> None:
    engine = _engine(checkpoint)
    with torch.no_grad():
        engine._runner.network.get_parameter("blocks.1.ffn.0.weight")[3, 5] = float("nan")
    session = engine.generate(face, speech(1))
    with pytest.raises(
        ModelError, match=r"block 0: the latents are not finite; weights with NaN.*blocks\.1\.ffn\.0\.weight"
    ):
        next(session)
    assert session.closed


@pytest.mark.parametrize("device", ["cuda:93", "tpu", "mps", "cuda:x"])
def test_devices_that_are_not_there(device: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=device):
        Engine.from_pretrained(checkpoint, config=EngineConfig(devices=device))


def test_errors_share_a_base() -> None:
    assert all(issubclass(error, LiveAvatarError) for error in (ConfigError, InputError, ModelError, SessionError))


def test_bf16_stays_close_to_fp32(checkpoint: Path, engine: Engine, face: np.ndarray) -> None:
    """bf16 has 8 bits: latents within a few percent, so pictures agree to a few grey levels on average."""
    exact = _frames(engine.generate(face, speech(1.0))).astype(float)
    low = _frames(_engine(checkpoint, precision="bf16").generate(face, speech(1.0))).astype(float)
    assert 0 < np.abs(exact - low).mean() < 6


def test_importing_needs_no_media_library_and_prints_nothing(checkpoint: Path) -> None:
    """The machine that measures GPUs has neither av nor soxr, ftfy or PIL; arrays must do there."""
    script = """
import sys
for name in ("av", "soxr", "PIL", "triton"):
    sys.modules[name] = None
import numpy as np
from liveavatar_engine import Engine, EngineConfig
engine = Engine.from_pretrained(sys.argv[1], config=EngineConfig(size="64x64", devices="cpu"))
assert len(list(engine.generate(np.zeros((64, 64, 3), np.uint8), np.ones(16000, np.float32)))) == 3
"""
    run = subprocess.run([sys.executable, "-c", script, str(checkpoint)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr == ""


def test_session_is_public() -> None:
    assert Session.__doc__
