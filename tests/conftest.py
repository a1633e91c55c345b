"""What all tests share: the golden checkpoint loaded once, NaN-poisoned uninitialised memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import CPU, GOLDEN, OWN_GOLDEN, poison

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when it defines a kernel


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small are faster on one thread than on two that wait for each other, above all beside other work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def real_constructors() -> None:
    """`torch.device` lists the constructors that it redirects once: let it see torch.empty before it is poisoned."""
    with torch.device("meta"):
        assert torch.empty(0).is_meta


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make uninitialised memory hold NaN, so that nothing that was never written can be read unnoticed."""
    poison(monkeypatch.setattr)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return OWN_GOLDEN / "checkpoint"


@pytest.fixture(scope="session")
def network(checkpoint: Path) -> Any:
    return _network(checkpoint)


@pytest.fixture(scope="session")
def vae(checkpoint: Path) -> Any:
    return _vae(checkpoint)


@pytest.fixture(scope="session")
def golden_checkpoint() -> Path:
    return GOLDEN / "checkpoint"


@pytest.fixture(scope="session")
def golden_network(golden_checkpoint: Path) -> Any:
    return _network(golden_checkpoint)


@pytest.fixture(scope="session")
def golden_vae(golden_checkpoint: Path) -> Any:
    return _vae(golden_checkpoint)


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


def _network(checkpoint: Path) -> Any:
    from liveavatar_engine.weights.network import load_network

    return load_network(checkpoint, None, torch.float32, CPU)


def _vae(checkpoint: Path) -> Any:
    from liveavatar_engine.vae.vae import load_vae

    return load_vae(checkpoint / "Wan2.1_VAE.pth", torch.float32, CPU)
