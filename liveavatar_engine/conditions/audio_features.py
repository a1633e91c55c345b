"""Audio states of a block: of whole utterances at once, or window by window for live and long audio.

wav2vec2 attends to everything it is given and normalises by it, so what a column's state is depends on the span that
is encoded with it. "global" encodes the utterance as a whole, as the reference does for files. "windowed" encodes, for
every block, a fixed span around it and nothing else: a file and the same samples pushed live give the same bits.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..config.geometry import FRAMES_PER_SECOND, SPEECH_RATE
from .audio_encoder import (
    FEATURE_RATE,
    SAMPLES_PER_STATE,
    STATE_RATE,
    AudioEncoder,
    feature_index,
    features_30hz,
    pick_columns,
    state_moments,
)
from .audio_window import AudioWindow, column_moments, lerp_columns
from .speech import Speech

GLOBAL_SECONDS = 60
"""Longest utterance that is encoded as a whole."""
LEFT_CONTEXT = 240 * SAMPLES_PER_STATE
"""Samples before a block in its window: 4.8 s."""
LOOK_AHEAD = 8 * SAMPLES_PER_STATE
"""Samples after a block in its window: 160 ms, the price in latency of live audio."""
SAMPLES_PER_COLUMN = SPEECH_RATE // FRAMES_PER_SECOND


class Features(Protocol):
    """States of one or several actors, block by block, in order."""

    def block(self, index: int) -> Tensor | None:
        """float32 [actors, layers, dim, columns_per_block], zero past the end; None behind the last block."""

    def ready(self, index: int) -> bool:
        """Whether `block` would return without waiting for audio."""

    @property
    def columns(self) -> int | None:
        """Video frames that the audio lasts, rounded up; None until its end has been seen."""


def column_count(samples: int) -> int:
    """Video frames that `samples` last, rounded up."""
    return -(-samples // SAMPLES_PER_COLUMN)


class GlobalFeatures:
    """States of an utterance that was encoded as a whole."""

    def __init__(self, encoder: AudioEncoder, speech: np.ndarray, columns_per_block: int) -> None:
        self._features = features_30hz(encoder.states(speech))
        self._columns_per_block = columns_per_block
        self.columns: int | None = column_count(len(speech))

    def block(self, index: int) -> Tensor | None:
        first = index * self._columns_per_block
        assert self.columns is not None
        return pick_columns(self._features, first, self._columns_per_block)[None] if first < self.columns else None

    def ready(self, index: int) -> bool:
        return True


def window_samples(columns_per_block: int) -> int:
    """Samples of a block's whole window; those at the ends of a stream are shorter."""
    return LEFT_CONTEXT + columns_per_block * SAMPLES_PER_COLUMN + LOOK_AHEAD


class WindowedFeatures:
    """States of each block from a window of its own: left context, the block, look-ahead.

    `window` computes the whole ones; None: none has been recorded.
    """

    def __init__(
        self, encoder: AudioEncoder, speech: Speech, columns_per_block: int, window: AudioWindow | None = None
    ) -> None:
        self._encoder, self._speech, self._columns_per_block = encoder, speech, columns_per_block
        self._window = window

    @property
    def columns(self) -> int | None:
        total = self._speech.total
        return None if total is None else column_count(total)

    def block(self, index: int) -> Tensor | None:
        first = index * self._columns_per_block
        start, stop = (column * SAMPLES_PER_COLUMN for column in (first, first + self._columns_per_block))
        window_start = max(0, start - LEFT_CONTEXT)
        samples = self._speech.read(window_start, stop + LOOK_AHEAD)
        if window_start + len(samples) <= start:
            return None
        count, first_moment = self._columns_per_block, window_start // SAMPLES_PER_STATE
        if self._window is not None and len(samples) == self._window.samples:
            moments = column_moments(first, count, first_moment, state_moments(len(samples)) - 1)
            columns = self._window.columns(samples, moments)
        else:
            states = self._encoder.states(samples)
            moments = column_moments(first, count, first_moment, states.shape[1] - 1)
            columns = lerp_columns(states, *(torch.from_numpy(values).to(states.device) for values in moments))
        past = [self._past_the_end(feature_index(first + column)) for column in range(count)]
        if any(past):
            columns[:, :, past.index(True) :] = 0
        return columns[None]

    def ready(self, index: int) -> bool:
        return self._speech.holds((index + 1) * self._columns_per_block * SAMPLES_PER_COLUMN + LOOK_AHEAD)

    def _past_the_end(self, feature: int) -> bool:
        total = self._speech.total
        return total is not None and feature >= state_moments(total) * FEATURE_RATE // STATE_RATE


class ActorFeatures:
    """States of several actors side by side; who has ended is silent (zero states) until all have."""

    def __init__(self, actors: list[Features]) -> None:
        self._actors = actors

    @property
    def columns(self) -> int | None:
        known = [actor.columns for actor in self._actors]
        return None if None in known else max(count for count in known if count is not None)

    def block(self, index: int) -> Tensor | None:
        blocks = [actor.block(index) for actor in self._actors]
        present = [block for block in blocks if block is not None]
        if not present:
            return None
        silence = torch.zeros_like(present[0])
        return torch.cat([silence if block is None else block for block in blocks])

    def ready(self, index: int) -> bool:
        return all(actor.ready(index) for actor in self._actors)
