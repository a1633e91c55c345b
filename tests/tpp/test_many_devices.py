"""Real worker processes of a real model: the frames and latents of one device, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import CPU, GOLDEN, GoldenCase, golden_cases, relative_error, speech
from torch import Tensor

from liveavatar_engine import Engine, EngineConfig
from liveavatar_engine.conditions.still import still_conditions
from liveavatar_engine.config import ModelConfig, StreamGeometry
from liveavatar_engine.denoise.stream import Conditions, SinkPolicy
from liveavatar_engine.errors import ConfigError, SessionError
from liveavatar_engine.pipeline.runner import StreamOrder
from liveavatar_engine.pipeline.session import Session
from liveavatar_engine.pipeline.tpp.launch import Spawn
from liveavatar_engine.pipeline.tpp.many_devices import ManyDevices
from liveavatar_engine.pipeline.tpp.plan import StageCosts, make_plan
from liveavatar_engine.pipeline.tpp.setup import Weights
from liveavatar_engine.pipeline.tpp.trace import read_chrome_trace

BLOCKS = 13
UPDATE_AFTER = 4


def _engine(checkpoint: Path, devices: int, trace: Path | None = None, **settings: Any) -> Engine:
    names = tuple(f"cpu:{index}" for index in range(devices))
    return Engine.from_pretrained(checkpoint, config=EngineConfig(size="64x64", devices=names, **settings), trace=trace)


def _stream(engine: Engine, face: np.ndarray, seed: int = 1) -> list[tuple[np.ndarray, Tensor]]:
    """13 blocks, with the sink's update among them."""
    made = []
    with engine.generate(face, speech(0.48 * BLOCKS), "a face", seed=seed) as session:
        for chunk in session:
            assert session.last_latents is not None
            made.append((chunk.frames, session.last_latents.clone()))
    assert len(made) == BLOCKS
    return made


def _agree(one: list[tuple[np.ndarray, Tensor]], other: list[tuple[np.ndarray, Tensor]]) -> None:
    for (frames, latents), (other_frames, other_latents) in zip(one, other, strict=True):
        assert torch.equal(latents, other_latents)
        assert np.array_equal(frames, other_frames)


@pytest.fixture(scope="module")
def alone(checkpoint: Path, face: np.ndarray) -> list[tuple[np.ndarray, Tensor]]:
    with _engine(checkpoint, 1) as engine:
        made = _stream(engine, face)
    with _engine(checkpoint, 1, sink_update_after=None) as engine:
        unchanged = _stream(engine, face)
    _agree(made[:UPDATE_AFTER], unchanged[:UPDATE_AFTER])
    assert not torch.equal(made[UPDATE_AFTER][1], unchanged[UPDATE_AFTER][1]), "the sink's update is seen"
    return made


@pytest.fixture(scope="module")
def five(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The paper's layout, traced."""
    with _engine(checkpoint, 5, tmp_path_factory.mktemp("trace") / "trace.json") as engine:
        yield engine


def test_five_devices_make_the_same_video(
    five: Engine, alone: list[tuple[np.ndarray, Tensor]], face: np.ndarray
) -> None:
    assert [worker.stage for worker in five.workers()] == ["step 0", "step 1", "step 2", "step 3", "decode"]
    assert [worker.device for worker in five.workers()] == [f"cpu:{index}" for index in range(5)]
    _agree(_stream(five, face), alone)
    _agree(_stream(five, face), alone)


def test_live_audio_and_another_prompt_go_through_all_stages(five: Engine, checkpoint: Path, face: np.ndarray) -> None:
    streams = []
    for engine in (five, _engine(checkpoint, 1)):
        with engine.open_session(face, "a face", seed=3) as session:
            session.push_audio(speech(0.48 + 0.16))
            frames = [next(session).frames]
            session.change_prompt("another face")
            session.push_audio(speech(3.0))
            session.end_audio()
            frames += [chunk.frames for chunk in session]
        streams.append(frames)
    assert len(streams[0]) == 8
    assert all(np.array_equal(one, other) for one, other in zip(*streams, strict=True))


def test_the_trace_shows_every_block_on_every_rank(five: Engine) -> None:
    path = five._trace
    assert path is not None
    five.close()
    spans, labels = read_chrome_trace(path)
    assert len(labels) == 5
    for rank in range(5):
        kind = "decode" if rank == 4 else "compute"
        done = {span.block for span in spans if span.rank == rank and span.kind == kind and span.block >= 0}
        assert done == set(range(BLOCKS))
    assert {"send", "receive", "wait", "deliver"} <= {span.kind for span in spans}


def test_two_devices_make_the_same_video(
    checkpoint: Path, alone: list[tuple[np.ndarray, Tensor]], face: np.ndarray
) -> None:
    """The decoder shares the second one with two steps."""
    with _engine(checkpoint, 2, early_first_frame=True) as engine:
        assert [worker.stage for worker in engine.workers()] == ["steps 0-1", "steps 2-3 + decode"]
        with engine.generate(face, speech(0.48 * BLOCKS), "a face", seed=1) as session:
            frames = np.concatenate([chunk.frames for chunk in session])
    assert np.array_equal(frames, np.concatenate([frames for frames, _ in alone]))


def test_three_devices_make_the_same_videos_of_two_sessions(
    checkpoint: Path, alone: list[tuple[np.ndarray, Tensor]], face: np.ndarray
) -> None:
    with _engine(checkpoint, 3, max_sessions=2) as engine:
        assert [worker.stage for worker in engine.workers()] == ["steps 0-1", "steps 2-3", "decode"]
        with engine.generate(face, speech(0.48 * 4), "company", seed=9) as other:
            next(other)
            _agree(_stream(engine, face), alone)
            assert len(list(other)) == 3


def test_ranks_that_share_a_step_make_the_same_video(
    checkpoint: Path, alone: list[tuple[np.ndarray, Tensor]], face: np.ndarray
) -> None:
    with _engine(checkpoint, 5, sequence_parallel=2) as engine:
        assert [worker.stage for worker in engine.workers()] == [
            "steps 0-1 (1 of 2)",
            "steps 0-1 (2 of 2)",
            "steps 2-3 (1 of 2)",
            "steps 2-3 (2 of 2)",
            "decode",
        ]
        made = _stream(engine, face)
    for (_, latents), (_, expected) in zip(made, alone, strict=True):
        assert relative_error(latents, expected) <= 1e-5


class _GoldenColumns:
    def __init__(self, audio: Tensor) -> None:
        self.columns, self._audio = audio.shape[-1], audio

    def block(self, index: int) -> Tensor | None:
        return self._audio[..., 12 * index : 12 * index + 12] if 12 * index < self.columns else None

    def ready(self, index: int) -> bool:
        return True


@pytest.mark.parametrize("case", golden_cases("pipeline"))
def test_golden_pipeline(case: GoldenCase, golden_vae: Any) -> None:
    parameters = case.parameters
    checkpoint = GOLDEN / "checkpoint"
    model = ModelConfig.from_file(checkpoint / "config.json")
    geometry = StreamGeometry(model, *parameters["hw"], parameters["frames_per_block"], parameters["window_frames"])
    still = still_conditions(
        golden_vae, case["image"][0, :, 0], parameters["reference_frames"], parameters["motion_source_frames"]
    )
    policy = SinkPolicy(parameters["relative_dist"], parameters.get("sink_update_after"), parameters["seed"])
    conditions = Conditions(case["context"], still.reference, still.motion)
    names = ("cpu:0", "cpu:1")
    config = EngineConfig(size="{1}x{0}".format(*parameters["hw"]), devices=names, steps=parameters["steps"])
    plan = make_plan(names, parameters["steps"], StageCosts.of(1, 5))
    runner = ManyDevices(plan, config, Weights(str(checkpoint)), model, Spawn(), CPU)
    try:
        order = StreamOrder(geometry, conditions, policy, still.priming, _GoldenColumns(case["audio_input"]))
        session = Session(runner.open(order), [], lambda prompt: case["context"])
        for block, chunk in enumerate(session):
            assert session.last_latents is not None
            assert relative_error(session.last_latents, case["latents"][block]) <= 1e-5, f"block {block}"
            first = chunk.start_column - 3
            expected = case["frames"][0, :, first : first + len(chunk.frames)]
            shown = torch.from_numpy(chunk.frames).permute(3, 0, 1, 2) / 127.5 - 1
            assert (shown - expected).abs().max() <= 1 / 255 + 1e-3
        assert block == parameters["blocks"] - 1
    finally:
        runner.close()


# --- bad input, before anything is loaded


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"devices": ("cuda:0", "cuda:7")}, "cuda:.*this machine has 0 CUDA devices"),
        ({"devices": ("cpu:0", "cpu:0")}, "named twice"),
        ({"devices": ("cpu:0", "cpu:1"), "schedule": "diagonal"}, "several devices need schedule 'sequential'"),
        ({"devices": ("cpu:0", "cpu:1"), "kv_mode": "clean"}, "several devices need kv_mode 'timestep'"),
        ({"devices": ("cpu:0", "cpu:1"), "frames": "device"}, "several devices need frames 'host'"),
        ({"devices": tuple(f"cpu:{index}" for index in range(6))}, "6 devices"),
        ({"devices": ("cpu:0", "cpu:1", "cpu:2"), "sequence_parallel": 4}, "too few"),
        ({"devices": tuple(f"cpu:{index}" for index in range(6)), "sequence_parallel": 5}, "heads|tokens"),
        ({"devices": ("cpu",), "sequence_parallel": 2}, "sequence_parallel=2 needs"),
        ({"stage_ms": (0, 1)}, "stage_ms"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_loads(
    settings: dict[str, Any], error: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liveavatar_engine.pipeline.encoders.Encoders.load", None)
    monkeypatch.setattr("liveavatar_engine.pipeline.tpp.launch.Spawn.start", None)
    with pytest.raises(ConfigError, match=error):
        Engine.from_pretrained(checkpoint, config=EngineConfig(**settings))


def test_a_closed_engine_opens_no_session(checkpoint: Path, face: np.ndarray) -> None:
    engine = _engine(checkpoint, 1)
    assert engine.workers() == []
    engine.close()
    with pytest.raises(SessionError, match="closed"):
        engine.open_session(face)
    with pytest.raises(ConfigError, match="no workers"):
        engine.restart()


def test_a_closed_or_drained_engine_on_one_device_ends_its_sessions_alike(checkpoint: Path, face: np.ndarray) -> None:
    engine = _engine(checkpoint, 1, max_sessions=2)
    drained, closed = (engine.generate(face, speech(3.0)) for _ in range(2))
    next(drained)
    next(closed)
    engine.drain()
    assert list(drained) == []
    with pytest.raises(SessionError, match="drained"):
        engine.open_session(face)
    engine.close()
    with pytest.raises(SessionError, match="the engine is closed"):
        next(closed)


def test_a_worker_starts_without_the_encoders_library() -> None:
    """It takes longer to import than all else together."""
    code = "import sys, liveavatar_engine.worker; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
