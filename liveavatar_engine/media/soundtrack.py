"""The sound that goes under the video: the actors' files at their own quality, mixed and streamed."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from ..errors import InputError
from .audio import PcmReader, resampled
from .files import FilePath

_AAC_RATES = frozenset({8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000})
_BEST_RATE = 48_000
_KNEE = 0.8


class SoundSource(Protocol):
    """Anything that can be muxed under a video: sound that is pulled as the pictures advance."""

    @property
    def sample_rate(self) -> int:
        """Samples per second and channel, a rate that AAC knows."""

    @property
    def channels(self) -> int:
        """1 or 2."""

    def read(self, count: int) -> np.ndarray:
        """The next float32 [n, channels] with 1 <= n <= count, full scale 1.0; n = 0 once the sound has ended."""


class Soundtrack:
    """One sound file, or the mix of several actors' files, read along in flat memory.

    Several files are added up: actors mostly speak in turn, and each should be as loud as in his own file, which
    scaling by their number would spoil. Where they do speak at once and the sum would clip, the part above 0.8 of full
    scale is bent below 1.0 by a tanh; anything quieter, and a single file, stays as it is. An actor who ends early is
    silent until all have ended.

    Attributes:
        sample_rate: The file's own rate, or the highest of several; 48000 where AAC does not know it or it is higher.
        channels: 2 if any file is stereo, else 1. More than two channels count as one, their mean, as the model hears.

    Raises:
        InputError: at construction or from `read`, a file cannot be used; see `probe_audio` and `iter_speech`.
    """

    def __init__(self, paths: FilePath | Sequence[FilePath]) -> None:
        files = paths if isinstance(paths, Sequence) and not isinstance(paths, str) else [paths]
        if not files:
            raise InputError("a soundtrack needs at least one audio file")
        self._readers: list[PcmReader] = []
        try:
            for path in files:
                self._readers.append(PcmReader(path))
        except BaseException:
            self.close()
            raise
        rate = max(reader.sample_rate for reader in self._readers)
        self.sample_rate = rate if rate in _AAC_RATES else _BEST_RATE
        self.channels = 2 if any(reader.channels == 2 for reader in self._readers) else 1
        self._actors = [_Actor(reader, self.sample_rate, self.channels) for reader in self._readers]

    def read(self, count: int) -> np.ndarray:
        """The next `count` samples as float32 [n, channels]; n < count only at the end, n = 0 after it."""
        parts = [actor.read(count) for actor in self._actors]
        if len(parts) == 1:
            return parts[0]
        mix = np.zeros((max(map(len, parts), default=0), self.channels), np.float32)
        for part in parts:
            mix[: len(part)] += part
        return _softly_limited(mix)

    def close(self) -> None:
        """Close the files; there is nothing to read afterwards."""
        for reader in self._readers:
            reader.close()
        self._actors = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Actor:
    """One file's samples [n, channels] at the mix's rate, handed out in any portion."""

    def __init__(self, reader: PcmReader, rate: int, channels: int) -> None:
        pieces = (_with_channels(piece, channels) for piece in reader)
        self._pieces: Iterator[np.ndarray] = resampled(pieces, reader.sample_rate, rate, channels)
        self._rest = np.zeros((0, channels), np.float32)

    def read(self, count: int) -> np.ndarray:
        parts, have = [self._rest], len(self._rest)
        while have < count and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            have += len(piece)
        samples = np.concatenate(parts)
        self._rest = samples[count:]
        return samples[:count]


def _with_channels(piece: np.ndarray, channels: int) -> np.ndarray:
    """[any channels, n] -> [n, channels]."""
    if len(piece) != channels:
        piece = np.broadcast_to(piece.mean(axis=0), (channels, piece.shape[1]))
    return np.ascontiguousarray(piece.T)


def _softly_limited(mix: np.ndarray) -> np.ndarray:
    size = np.abs(mix)
    bent = _KNEE + (1 - _KNEE) * np.tanh((size - _KNEE) / (1 - _KNEE))
    return np.where(size > _KNEE, np.copysign(bent, mix), mix).astype(np.float32, copy=False)
