"""Samples of one speaker, from a file or live, read window by window with flat memory."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from ..config.geometry import SPEECH_RATE
from ..errors import InputError, SessionError


class Speech(ABC):
    """Float32 mono samples at 16 kHz, addressed from the start of the stream; what lies behind a read is dropped."""

    def __init__(self) -> None:
        self._chunks: list[np.ndarray] = []
        self._start = 0
        self._stop = 0
        self._ended = False

    @property
    def total(self) -> int | None:
        """Samples of the whole speech, once its end has been seen."""
        return self._stop if self._ended else None

    @property
    def held(self) -> int:
        """Samples in memory."""
        return self._stop - self._start

    def holds(self, stop: int) -> bool:
        """Whether a read up to `stop` would return without waiting."""
        return True

    def read(self, start: int, stop: int) -> np.ndarray:
        """Samples start..stop - 1, fewer where the speech ends; waits for them where it has to.

        A later read must not start before this one.
        """
        self._fetch(stop)
        samples = np.concatenate([np.empty(0, np.float32), *self._chunks])
        kept = samples[max(0, min(start, self._stop) - self._start) :]
        self._chunks, self._start = [kept], self._stop - len(kept)
        return kept[: max(0, stop - self._start)]

    @abstractmethod
    def _fetch(self, stop: int) -> None:
        """Append chunks until `stop` samples have come or the speech has ended."""

    def _append(self, samples: np.ndarray) -> None:
        self._chunks.append(samples)
        self._stop += len(samples)


class RecordedSpeech(Speech):
    """Speech pulled chunk by chunk from an iterator, such as a file's."""

    def __init__(self, chunks: Iterator[np.ndarray]) -> None:
        super().__init__()
        self._source = chunks

    def _fetch(self, stop: int) -> None:
        while not self._ended and self._stop < stop:
            chunk = next(self._source, None)
            if chunk is None:
                self._ended = True
            else:
                self._append(chunk)


class LiveSpeech(Speech):
    """Speech pushed by another thread; a read waits for what has not come yet."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._inbox: list[np.ndarray] = []
        self._finished = False

    def push(self, samples: np.ndarray) -> None:
        """Append float32 or int16 mono samples at 16 kHz, any number of them.

        Raises:
            InputError: another type or shape, or samples that are not finite.
            SessionError: the end has been announced already.
        """
        converted = as_samples(samples)
        with self._changed:
            if self._finished:
                raise SessionError("push_audio after end_audio: the stream has ended")
            self._inbox.append(converted)
            self._changed.notify_all()

    def holds(self, stop: int) -> bool:
        with self._changed:
            return self._finished or self._stop + sum(map(len, self._inbox)) >= stop

    def end(self) -> None:
        """Announce that no more samples come."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def _fetch(self, stop: int) -> None:
        with self._changed:
            while True:
                for samples in self._inbox:
                    self._append(samples)
                self._inbox.clear()
                self._ended = self._finished
                if self._ended or self._stop >= stop:
                    return
                self._changed.wait()


def as_samples(samples: np.ndarray) -> np.ndarray:
    """Float32 samples in [-1, 1] from float or int16 ones, copied: [samples].

    Raises:
        InputError: another type or shape, or samples that are not finite.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.dtype not in (np.float32, np.float64, np.int16):
        raise InputError(
            f"audio samples: expected float32 or int16 mono at {SPEECH_RATE} Hz, one axis, "
            f"not {samples.dtype} of shape {samples.shape}"
        )
    if samples.dtype == np.int16:
        return samples.astype(np.float32) / 32768.0
    converted = samples.astype(np.float32)
    if not np.isfinite(converted).all():
        raise InputError("audio samples: NaN or infinity among them")
    return converted
