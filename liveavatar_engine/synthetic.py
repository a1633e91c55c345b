"""Inputs made of nothing, for measurements: no file, and no library that reads one."""

from __future__ import annotations

import numpy as np

from .config.geometry import SPEECH_RATE

_SYLLABLES_PER_SECOND = 2.5


def picture(height: int, width: int, blue: int = 60) -> np.ndarray:
    """A bright disc on a gradient: uint8 [height, width, 3]; with another `blue`, 0 to 200, another picture."""
    rows, columns = np.mgrid[0:height, 0:width]
    disc = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (min(height, width) / 3) ** 2
    planes = (rows * 200 // height, columns * 200 // width, np.full_like(rows, blue))
    return (np.stack(planes, axis=-1) + 50 * disc[..., None]).astype(np.uint8)


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise with a syllable-like loudness: float32 mono at 16 kHz."""
    count = round(seconds * SPEECH_RATE)
    loudness = np.abs(np.sin(np.arange(count) / SPEECH_RATE * 2 * np.pi * _SYLLABLES_PER_SECOND))
    return (np.random.default_rng(seed).standard_normal(count) * 0.1 * loudness).astype(np.float32)
