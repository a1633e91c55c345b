"""A light decoder's file, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import CPU
from taehv_weights import State, random_state

from liveavatar_engine.vae.light import LightDecoder


@pytest.fixture(scope="session")
def light_state() -> State:
    return random_state()


@pytest.fixture(scope="session")
def light_file(light_state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("light") / "taew2_1.pth"
    torch.save(light_state, path)
    return path


@pytest.fixture(scope="session")
def light(light_file: Path) -> LightDecoder:
    return LightDecoder.load(light_file, torch.float32, CPU)
