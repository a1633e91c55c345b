"""Synthetic inputs: no file, and no library that reads one."""

from __future__ import annotations

import numpy as np

from ..conditions.audio_features import LOOK_AHEAD
from ..config import StreamGeometry
from ..config.geometry import SPEECH_RATE

_SYLLABLES_PER_SECOND = 2.5


def picture(geometry: StreamGeometry) -> np.ndarray:
    """A bright disc on a gradient, at the stream's size: uint8 [height, width, 3]."""
    height, width = geometry.height, geometry.width
    rows, columns = np.mgrid[0:height, 0:width]
    disc = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (min(height, width) / 3) ** 2
    planes = (rows * 200 // height, columns * 200 // width, np.full_like(rows, 60))
    return (np.stack(planes, axis=-1) + 50 * disc[..., None]).astype(np.uint8)


def speech(seconds: float, seed: int) -> np.ndarray:
    """Noise with a syllable-like loudness: float32 mono at 16 kHz."""
    count = round(seconds * SPEECH_RATE)
    loudness = np.abs(np.sin(np.arange(count) / SPEECH_RATE * 2 * np.pi * _SYLLABLES_PER_SECOND))
    return (np.random.default_rng(seed).standard_normal(count) * 0.1 * loudness).astype(np.float32)


def look_ahead_seconds() -> float:
    """Audio behind a block that live encoding waits for."""
    return LOOK_AHEAD / SPEECH_RATE
