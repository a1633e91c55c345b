"""The video as a file: H.264 pictures and AAC sound in one mp4, frame k of it at audio column k."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Self, TypeAlias

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from ..config.geometry import FRAMES_PER_SECOND
from ..errors import ConfigError, OutputError
from .files import FilePath
from .part_file import PartFile
from .soundtrack import SoundSource

Watermark: TypeAlias = Callable[[np.ndarray, int], np.ndarray]
"""(its own copy of frames uint8 [T, H, W, 3], the first one's index in the file) -> frames, same shape and dtype."""

TAGS = frozenset(
    """title artist album_artist composer album date comment genre copyright grouping lyrics description synopsis
    show episode_id network keywords""".split()  # noqa: SIM905
)
"""Metadata keys that an mp4 can hold under names every player knows."""

_X264 = {"preset": "veryfast", "crf": "18", "x264-params": "mbtree=0"}
"""Without macroblock-tree rate control, which makes one of several files of the same small pictures (docs/log.md)."""
_BT709 = 1  # matrix, primaries and transfer alike, in ITU-T H.273
_AAC_BITRATE = 96_000
_AAC_MOST_BITS_PER_SAMPLE = 6


class Mp4Writer:
    """Writes frames and their sound to an mp4 file as they are made, in flat memory.

    Frame k of the file is shown at k / fps seconds, where the sound of audio column k is heard. The model's first
    frame belongs to column 3: the first frame given is shown from time 0 on, repeated for the columns before its own.
    The soundtrack is pulled as far as the pictures reach and ends with them; it stays the caller's to close.

    The file appears under its name only when closed, whole and playable; until then it grows in a hidden neighbour.
    As a context manager, the writer closes at the end of the block and also after Ctrl-C, which leaves a video of all
    frames so far. After any other exception, a failed write, or without a single frame, it leaves nothing behind, and
    a file that was there before stays as it was.

    The file says that it is AI-generated: in its title and description unless `metadata` (keys: `TAGS`) gives
    others, and always in its comment, where a comment of the caller's follows the notice.

    Raises:
        OutputError: at construction, nothing can be written at `path`; the message says why.
        ConfigError: a side is not a positive even number, fps is not a positive integer, or a metadata key is unknown.
    """

    def __init__(
        self,
        path: FilePath,
        width: int,
        height: int,
        fps: int = FRAMES_PER_SECOND,
        soundtrack: SoundSource | None = None,
        watermark: Watermark | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        _check_format(width, height, fps)
        if "libx264" not in av.codecs_available:
            raise OutputError(f"cannot write {path}: this build of PyAV has no libx264; install av from PyPI")
        tags = _tags(metadata or {})
        self._shape = (height, width, 3)
        self._fps = fps
        self._soundtrack = soundtrack
        self._watermark = watermark
        self._frames_written = 0
        self._samples_written = 0
        self._open = True
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mp4-writer")
        self._to_yuv = VideoReformatter()
        self._file = PartFile(path)
        self._container = av.open(str(self._file.part), "w", format="mp4", options={"movflags": "faststart"})
        with self._failing_cleanly():
            self._container.metadata.update(tags)
            self._video = self._video_stream()
            self._audio = self._audio_stream(soundtrack) if soundtrack else None
            self._container.start_encoding()

    @property
    def frames_written(self) -> int:
        """Frames in the file so far, repeated ones included: the audio column that the next frame must have."""
        return self._frames_written

    def write(self, frames: np.ndarray, start_column: int) -> None:
        """Append frames, uint8 [T, H, W, 3] RGB, that belong to the audio columns from `start_column` on.

        The first call may start at any column; each later one must start where the last ended.

        Raises:
            OutputError: wrong shape or dtype, a gap or overlap, a misbehaving watermark, a closed writer, or a failing
                disk, after which the writer is closed and the part file gone.
            InputError: the soundtrack cannot be read any further.
        """
        if not self._open:
            raise OutputError(f"cannot write to {self._file.target}: it is closed")
        self._check(frames, "frames")
        if not len(frames):
            return
        if self._frames_written == 0:
            for _ in range(start_column):
                self._append(frames[:1])
        if start_column != self._frames_written:
            raise OutputError(
                f"cannot write {self._file.target}: frames for column {self._frames_written} were expected next, "
                f"not {start_column}"
            )
        self._append(frames)

    def close(self) -> None:
        """Finish the file and move it to its name; without a frame, leave nothing. A second call does nothing.

        Raises:
            OutputError: the disk is full or failing; nothing is left behind.
        """
        if not self._open:
            return
        try:
            self._run(self._finish)
        finally:
            self.abort()

    def abort(self) -> None:
        """Give up: remove what was written, leave the target as it was. Does nothing on a closed writer."""
        if not self._open:
            return
        self._open = False
        self._encoder.shutdown()
        with suppress(av.FFmpegError, OSError):
            self._container.close()
        self._file.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.close()
        else:
            self.abort()

    def _video_stream(self) -> av.VideoStream:
        stream = self._container.add_stream("libx264", rate=self._fps, options=_X264)
        stream.height, stream.width = self._shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, self._fps)
        stream.codec_context.colorspace = _BT709
        stream.codec_context.color_primaries = _BT709
        stream.codec_context.color_trc = _BT709
        stream.codec_context.color_range = ColorRange.MPEG
        return stream

    def _audio_stream(self, soundtrack: SoundSource) -> av.AudioStream:
        stream = self._container.add_stream("aac", rate=soundtrack.sample_rate, layout=_layout(soundtrack))
        bits_per_channel = min(_AAC_BITRATE, _AAC_MOST_BITS_PER_SAMPLE * soundtrack.sample_rate)
        stream.bit_rate = bits_per_channel * soundtrack.channels
        return stream

    def _append(self, frames: np.ndarray) -> None:
        self._run(self._encode, self._watermarked(frames))

    def _run(self, task: Callable[..., None], *arguments: np.ndarray) -> None:
        """Run a task on the encoder's own thread: Ctrl-C ends the wait for it, but never cuts it in half."""
        with self._failing_cleanly():
            self._encoder.submit(task, *arguments).result()

    def _encode(self, frames: np.ndarray) -> None:
        for picture in frames:
            self._container.mux(self._video.encode(self._video_frame(picture)))
            self._frames_written += 1
        self._pull_sound()

    def _finish(self) -> None:
        if not self._frames_written:
            return
        self._container.mux(self._video.encode(None))
        if self._audio is not None:
            self._container.mux(self._audio.encode(None))
        self._container.close()
        self._file.publish()

    def _video_frame(self, picture: np.ndarray) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = self._to_yuv.reformat(
            frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        frame.pts, frame.time_base = self._frames_written, Fraction(1, self._fps)
        return frame

    def _pull_sound(self) -> None:
        if self._soundtrack is None or self._audio is None:
            return
        end = self._frames_written * self._soundtrack.sample_rate // self._fps
        while self._samples_written < end:
            samples = self._soundtrack.read(end - self._samples_written)
            if not len(samples):
                return
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples.T), format="fltp", layout=_layout(self._soundtrack)
            )
            frame.sample_rate, frame.pts = self._soundtrack.sample_rate, self._samples_written
            frame.time_base = Fraction(1, self._soundtrack.sample_rate)
            self._container.mux(self._audio.encode(frame))
            self._samples_written += len(samples)

    def _watermarked(self, frames: np.ndarray) -> np.ndarray:
        if self._watermark is None:
            return frames
        marked = self._watermark(frames.copy(), self._frames_written)
        hook = getattr(self._watermark, "__qualname__", repr(self._watermark))
        self._check(marked, f"what the watermark hook {hook} returned", len(frames))
        return marked

    def _check(self, frames: np.ndarray, what: str, count: int | None = None) -> None:
        height, width, _ = self._shape
        expected = f"uint8 [{'T' if count is None else count}, {height}, {width}, 3]"
        if not isinstance(frames, np.ndarray):
            raise OutputError(f"{what}: {expected} was expected, not {type(frames).__name__}")
        right_count = frames.ndim == 4 and count in (None, len(frames))
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape or not right_count:
            raise OutputError(f"{what}: {expected} was expected, not {frames.dtype} {list(frames.shape)}")

    @contextmanager
    def _failing_cleanly(self) -> Iterator[None]:
        """Around everything that writes: a failure leaves nothing on disk and becomes one OutputError."""
        try:
            yield
        except (av.FFmpegError, OSError) as error:
            self.abort()
            raise self._file.error(error) from error
        except Exception:
            self.abort()
            raise


def ai_notice() -> str:
    """The sentence in every file's comment that says where the video comes from."""
    try:
        return f"AI-generated video: made by Live Avatar with liveavatar-engine {version('liveavatar-engine')}"
    except PackageNotFoundError:
        return "AI-generated video: made by Live Avatar with liveavatar-engine"


def _tags(metadata: Mapping[str, str]) -> dict[str, str]:
    unknown = sorted(set(metadata) - TAGS)
    if unknown:
        raise ConfigError(f"an mp4 has no metadata called {', '.join(unknown)}; it knows {', '.join(sorted(TAGS))}")
    defaults = {
        "title": "AI-generated talking-avatar video",
        "description": "AI-generated: the pictures were synthesised from a portrait and a recording of speech.",
    }
    comment = " - ".join(filter(None, (ai_notice(), metadata.get("comment"))))
    return {**defaults, **metadata, "comment": comment}


def _check_format(width: int, height: int, fps: int) -> None:
    if width <= 0 or height <= 0 or width % 2 or height % 2:
        raise ConfigError(f"a video of {width}x{height} cannot be written: both sides must be positive and even")
    if fps <= 0 or fps != int(fps):
        raise ConfigError(f"fps={fps}: a positive whole number of frames per second was expected")


def _layout(soundtrack: SoundSource) -> str:
    return "mono" if soundtrack.channels == 1 else "stereo"
