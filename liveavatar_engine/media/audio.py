"""Sound out of any audio or video file: what it is, and its speech as the model hears it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
import soxr

from ..config.geometry import SPEECH_RATE
from ..errors import InputError
from .files import FilePath, best_stream, decode, open_media

_MICROSECONDS = 1_000_000


@dataclass(frozen=True)
class AudioInfo:
    """What a file says about its sound.

    Attributes:
        path: The file, absolute.
        sample_rate: Samples per second and channel.
        channels: Number of channels.
        duration: Length in seconds, `None` where the container does not say. Not exact for every format.
    """

    path: Path
    sample_rate: int
    channels: int
    duration: float | None


def probe_audio(path: FilePath) -> AudioInfo:
    """Look at a file's sound without reading it all; its first samples are decoded to be sure that there are any.

    Raises:
        InputError: the file is missing, is no audio or video file, has no audio stream or not a single sample.
    """
    with PcmReader(path) as reader:
        return AudioInfo(reader.path, reader.sample_rate, reader.channels, reader.duration)


def iter_speech(path: FilePath, chunk_samples: int = 5 * SPEECH_RATE) -> Iterator[np.ndarray]:
    """Stream a file's sound as float32 mono chunks [chunk_samples] at 16 kHz, full scale 1.0; the last may be shorter.

    The file is opened at the call and then read along with the iteration, so memory stays flat for hours of sound.
    The samples are those of `librosa.load(path, sr=16000)`: the mean of the channels, resampled by soxr's "HQ" recipe;
    they do not depend on `chunk_samples`. Float sound above full scale is not clipped.

    Raises:
        InputError: as `probe_audio`; while iterating, where samples are not finite or the stream changes its format.
    """
    return _rechunked(_speech(PcmReader(path)), chunk_samples)


def load_speech(path: FilePath) -> np.ndarray:
    """The whole of a file's sound as float32 [samples] mono at 16 kHz: the chunks of `iter_speech`, joined.

    Raises:
        InputError: as `iter_speech`.
    """
    return np.concatenate(list(iter_speech(path)))


class PcmReader:
    """Iterates over a file's sound as float32 pieces [channels, samples], full scale 1.0, at its own rate.

    Integer samples are divided by their full scale, as libsndfile does. Pieces are as long as the codec makes them.

    Attributes:
        path: The file, absolute.
        sample_rate: Samples per second, as decoded.
        channels: Number of channels, as decoded.
        duration: Length in seconds, `None` where the container does not say.

    Raises:
        InputError: at construction, the file is missing, is no audio or video file, has no audio stream or not a
            single sample; while iterating, samples are not finite or the stream changes its rate or channels.
    """

    def __init__(self, path: FilePath) -> None:
        self._container = open_media(path, "audio")
        self.path = Path(self._container.name)
        self._frames = (frame for frame in decode(self._container, "audio") if frame.samples)
        self._first = next(self._frames, None)
        if self._first is None:
            self.close()
            raise InputError(f"audio {self.path} holds no sound: not a single sample could be decoded")
        self.sample_rate, self.channels = _format(self._first)
        self.duration = self._duration()

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._first is not None:
            frame, self._first = self._first, None
            yield self._samples(frame)
        for frame in self._frames:
            yield self._samples(frame)

    def close(self) -> None:
        """Close the file; further iteration is not possible."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _duration(self) -> float | None:
        stream = best_stream(self._container, "audio")
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return None if self._container.duration is None else self._container.duration / _MICROSECONDS

    def _samples(self, frame: av.AudioFrame) -> np.ndarray:
        if _format(frame) != (self.sample_rate, self.channels):
            rate, channels = _format(frame)
            raise InputError(
                f"audio {self.path} changes from {self.sample_rate} Hz, {self.channels} channels to {rate} Hz, "
                f"{channels} channels on the way; convert it to one format first"
            )
        samples = _full_scale_one(frame)
        if not np.isfinite(samples).all():
            raise InputError(f"audio {self.path} holds samples that are not finite (NaN or infinity)")
        return samples


def resampled(pieces: Iterator[np.ndarray], rate: int, wanted_rate: int, channels: int) -> Iterator[np.ndarray]:
    """Change the rate of float32 pieces [samples, channels], or [samples] for one channel, by soxr's "HQ" recipe."""
    if rate == wanted_rate:
        yield from pieces
        return
    stream = soxr.ResampleStream(rate, wanted_rate, channels, dtype="float32", quality="HQ")
    piece = np.zeros((0, channels) if channels > 1 else 0, np.float32)
    for piece in pieces:
        yield stream.resample_chunk(piece)
    yield stream.resample_chunk(piece[:0], last=True)


def _speech(reader: PcmReader) -> Iterator[np.ndarray]:
    with reader:
        yield from resampled((piece.mean(axis=0) for piece in reader), reader.sample_rate, SPEECH_RATE, channels=1)


def _rechunked(pieces: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    waiting: list[np.ndarray] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += len(piece)
        if count < size:
            continue
        joined = np.concatenate(waiting)
        full = count - count % size
        yield from np.split(joined[:full], full // size)
        waiting, count = [joined[full:]], count - full
    if count:
        yield np.concatenate(waiting)


def _format(frame: av.AudioFrame) -> tuple[int, int]:
    return frame.sample_rate, frame.layout.nb_channels


def _full_scale_one(frame: av.AudioFrame) -> np.ndarray:
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    full_scale = np.float32(2.0 ** (8 * samples.dtype.itemsize - 1))
    offset = full_scale if samples.dtype.kind == "u" else np.float32(0)
    return (samples.astype(np.float32) - offset) / full_scale
