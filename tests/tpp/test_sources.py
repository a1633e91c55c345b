"""Workers make their own parts: random ones are those of one device, and what has no room for its share says which."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import Threads

from liveavatar_engine import EngineConfig
from liveavatar_engine.errors import DeviceMemoryError
from liveavatar_engine.pipeline import assembly
from liveavatar_engine.pipeline.engine import Engine
from liveavatar_engine.pipeline.source import Files, RandomWeights
from liveavatar_engine.synthetic import picture, speech
from liveavatar_engine.weights import budget

SIZE = {"size": "64x64", "features": "windowed", "stage_ms": (1, 1)}


def frames(source: Files | RandomWeights, devices: str | list[str]) -> np.ndarray:
    config = EngineConfig.from_mapping({**SIZE, "devices": devices})
    parts = assembly.assemble(source, config, None, None, trace=False)
    with Engine(parts.config, parts.runner, parts.encoders) as engine:
        session = engine.generate(picture(64, 64), speech(3.0), "a person", max_blocks=5)
        return np.concatenate([np.asarray(chunk.frames) for chunk in session])


def test_random_weights_are_the_same_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "Spawn", Threads)
    one = frames(RandomWeights("tiny", 3), "cpu")
    assert one.std() > 0
    assert np.array_equal(one, frames(RandomWeights("tiny", 3), ["cpu:0", "cpu:1"]))
    assert not np.array_equal(one, frames(RandomWeights("tiny", 4), "cpu"))


def test_a_rank_without_room_is_named_before_anything_is_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def free(device: torch.device) -> int:
        asked.append(device)
        return 10**12 if len(asked) == 1 else 0  # the engine's own process asks first

    monkeypatch.setattr(assembly, "Spawn", Threads)
    monkeypatch.setattr(budget, "free_memory", free)
    monkeypatch.setattr(Files, "network", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(Files, "decoder", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(DeviceMemoryError, match=r"rank [01] \([^)]*on cpu:[01], pid \d+\): cpu: this needs") as error:
        frames(Files(checkpoint), ["cpu:0", "cpu:1"])
    assert "what would help" in str(error.value)
    assert "audio encoder" not in str(error.value)


def test_encoders_without_room_start_no_worker(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "Spawn", lambda: pytest.fail("a worker was started"))
    monkeypatch.setattr(budget, "free_memory", lambda _: 0)
    with pytest.raises(DeviceMemoryError, match="cpu: the encoders need"):
        frames(Files(checkpoint), ["cpu:0", "cpu:1"])
