"""What all tests share: the golden set, its checkpoint loaded once, NaN-poisoned uninitialised memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make torch.empty return NaN, so that nothing that was never written can be read unnoticed."""
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and not out.is_meta else out

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return GOLDEN / "checkpoint"


@pytest.fixture(scope="session")
def network(checkpoint: Path) -> Any:
    from liveavatar_engine.weights.network import load_network

    return load_network(checkpoint, None, torch.float32, CPU)


@pytest.fixture(scope="session")
def vae(checkpoint: Path) -> Any:
    from liveavatar_engine.vae.vae import load_vae

    return load_vae(checkpoint / "Wan2.1_VAE.pth", torch.float32, CPU)
