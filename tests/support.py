"""Helpers for tests: the golden set, errors, sound."""

from __future__ import annotations

import json
import math
import os
import wave
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

OWN_GOLDEN = Path(__file__).parent / "golden"
"""The repository's copy of the golden set, whose checkpoint all tests run on but those of parity."""
GOLDEN = Path(os.environ.get("LIVEAVATAR_GOLDEN", OWN_GOLDEN))
"""The golden set that parity is tested with, whatever its cases and sizes."""
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


def sqnr(actual: Tensor, expected: Tensor) -> float:
    """Signal to quantisation noise in dB: 20 log10(||expected|| / ||actual - expected||)."""
    return -20 * math.log10(max(relative_error(actual, expected), 1e-30))


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, in which NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def poison(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let memory that torch leaves uninitialised hold NaN from now on."""

    def poisoned(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            out = real(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and not out.is_meta else out

        return make

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        set_attribute(owner, name, poisoned(getattr(owner, name)))


def write_wav(path: Path, samples: np.ndarray) -> Path:
    """Write float mono samples as 16-bit PCM at 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path
