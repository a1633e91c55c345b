"""What all tests share: the golden set, its checkpoint loaded once, NaN-poisoned uninitialised memory."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(os.environ.get("LIVEAVATAR_GOLDEN", Path(__file__).parent / "golden"))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class GoldenCase:
    """One file of the golden set: its tensors, and the parameters in its metadata."""

    name: str
    parameters: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @classmethod
    @cache
    def load(cls, path: Path) -> GoldenCase:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            parameters = {name: json.loads(text) for name, text in file.metadata().items()}
        return cls(path.stem, parameters, tensors)


def golden_cases(kind: str) -> list[Any]:
    """Every golden case of a kind, as pytest parameters."""
    cases = [GoldenCase.load(path) for path in sorted((GOLDEN / "cases").glob("*.safetensors"))]
    return [pytest.param(case, id=case.name) for case in cases if case.parameters["kind"] == kind]


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Something like speech: noise with a syllable-like loudness, float32 mono at 16 kHz."""
    count = round(seconds * 16_000)
    loudness = np.abs(np.sin(np.arange(count) / 16_000 * 2 * np.pi * 2.5))
    return (np.random.default_rng(seed).standard_normal(count) * 0.1 * loudness).astype(np.float32)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty return NaN, so that nothing that was never written can be read unnoticed."""
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and not out.is_meta else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return GOLDEN / "checkpoint"


@pytest.fixture(scope="session")
def network(checkpoint: Path) -> Any:
    from liveavatar_engine.weights.network import load_network

    return load_network(checkpoint, None, torch.float32, CPU)


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> Any:
    """The golden checkpoint as an engine at 64x64, room for two sessions; the default configuration otherwise."""
    from liveavatar_engine import Engine, EngineConfig

    return Engine.from_pretrained(checkpoint, config=EngineConfig(size="64x64", devices="cpu", max_sessions=2))


@pytest.fixture(scope="session")
def face() -> np.ndarray:
    """A picture of 64x64: a bright disc on a gradient."""
    rows, columns = np.mgrid[0:64, 0:64]
    disc = ((rows - 32) ** 2 + (columns - 32) ** 2 < 400) * 120
    return np.stack((rows * 2 + disc, columns * 2 + disc, 60 + disc), axis=-1).astype(np.uint8)


@pytest.fixture(scope="session")
def vae(checkpoint: Path) -> Any:
    from liveavatar_engine.vae.vae import load_vae

    return load_vae(checkpoint / "Wan2.1_VAE.pth", torch.float32, CPU)
