"""Pictures out of a video file, at the rate the model wants them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

from ..errors import InputError
from .files import FilePath, best_stream, decode, open_media


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about its pictures.

    Attributes:
        path: The file, absolute.
        width: Pixels per row, as shown (a phone's rotation applied).
        height: Rows, as shown.
        fps: Average frames per second.
        frames: Number of frames, `None` where the container does not say.
    """

    path: Path
    width: int
    height: int
    fps: float
    frames: int | None


def probe_video(path: FilePath) -> VideoInfo:
    """Look at a file's pictures without reading them all; the first is decoded to be sure that there is one.

    Raises:
        InputError: the file is missing, is no video, has no video stream, not a single frame or no frame rate.
    """
    with open_media(path, "video") as container:
        fps = _fps(container)
        first = next(_upright(container), None)
        if first is None:
            raise _empty(container)
        frames = best_stream(container, "video").frames or None
        return VideoInfo(Path(container.name), first.shape[1], first.shape[0], fps, frames)


def iter_video_frames(path: FilePath, fps: float) -> Iterator[np.ndarray]:
    """Stream about `fps` frames per second of a video, each uint8 [H, W, 3] RGB and upright.

    As in the reference, frames are taken at one interval, max(1, round(file's rate / fps)), from the first on; none is
    ever repeated, so a file slower than `fps` gives all its frames. The file is opened at the call and then read along
    with the iteration.

    Raises:
        InputError: as `probe_video`; the missing frame shows only when iterating.
    """
    container = open_media(path, "video")
    try:
        interval = max(1, round(_fps(container) / fps))
    except InputError:
        container.close()
        raise
    return _every(interval, container)


def _every(interval: int, container: InputContainer) -> Iterator[np.ndarray]:
    with container:
        count = 0
        for picture in _upright(container, interval):
            count += 1
            yield picture
        if not count:
            raise _empty(container)


def _upright(container: InputContainer, interval: int = 1) -> Iterator[np.ndarray]:
    best_stream(container, "video").codec_context.thread_type = "AUTO"
    reformatter = VideoReformatter()
    for index, frame in enumerate(decode(container, "video")):
        if index % interval == 0:
            yield _rgb(frame, reformatter)


def _rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    picture = reformatter.reformat(frame, format="rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, frame.rotation // 90))


def _fps(container: InputContainer) -> float:
    stream = best_stream(container, "video")
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise InputError(f"video {container.name} does not say how many frames per second it has")
    return float(rate)


def _empty(container: InputContainer) -> InputError:
    return InputError(f"video {container.name} has no picture: not a single frame could be decoded")
