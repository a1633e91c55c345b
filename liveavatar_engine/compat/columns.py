"""Audio states of a pipeline's blocks, where it differs from the engine's: whole clips, callbacks, noise in front."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..conditions.audio_features import Features
from ..conditions.speech import as_samples
from ..config import StreamGeometry


class WholeClips:
    """Speech that goes on in silence (zero states) to the end of its last clip."""

    def __init__(self, spoken: Features, geometry: StreamGeometry, clips: int) -> None:
        self._spoken, self._blocks = spoken, clips * geometry.blocks_per_clip
        self.columns: int | None = self._blocks * geometry.columns_per_block
        self._silence = torch.empty(0)

    def block(self, index: int) -> Tensor | None:
        if index >= self._blocks:
            return None
        states = self._spoken.block(index)
        if states is None:
            return self._silence
        self._silence = torch.zeros_like(states)
        return states

    def ready(self, index: int) -> bool:
        return self._spoken.ready(index)


class NoiseFirst:
    """Speech behind some blocks of normally distributed states, with which the reference's live pipeline begins.

    Args:
        spoken: what follows.
        shape: of a block's states, [actors, layers, dim, columns_per_block].
        blocks: of noise.
        seed: of the noise; drawn on the CPU.
    """

    def __init__(self, spoken: Features, shape: tuple[int, int, int, int], blocks: int, seed: int) -> None:
        self._spoken, self._shape, self._blocks = spoken, shape, blocks
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def columns(self) -> int | None:
        spoken = self._spoken.columns
        return None if spoken is None else spoken + self._blocks * self._shape[-1]

    def block(self, index: int) -> Tensor | None:
        if index < self._blocks:
            return torch.randn(self._shape, generator=self._generator)
        return self._spoken.block(index - self._blocks)

    def ready(self, index: int) -> bool:
        return index < self._blocks or self._spoken.ready(index - self._blocks)


def called_samples(callback: Callable[[], np.ndarray | None]) -> Iterator[np.ndarray]:
    """Samples that a callback gives, as float32 at 16 kHz, until it returns None or nothing."""
    while (samples := callback()) is not None and len(samples):
        yield as_samples(samples)
