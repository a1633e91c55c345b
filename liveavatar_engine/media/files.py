"""What every reader of this package does first: find the file, open it, step over damage."""

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias, cast, overload

import av
from av.container import InputContainer
from av.stream import Disposition

from ..errors import InputError

logger = logging.getLogger(__name__)

FilePath: TypeAlias = str | os.PathLike[str]
Kind: TypeAlias = Literal["audio", "video"]

# Demuxers with which FFmpeg "plays" things that are no video: pictures, and text as the screen of a terminal.
_NOT_A_VIDEO = ("image2", "_pipe", "tty")


def existing_file(path: FilePath, what: str) -> Path:
    """`path` as an absolute `Path` to a regular file; `what` names its role in messages ("image", "audio").

    Raises:
        InputError: nothing is there, or it is a directory, a pipe or a device.
    """
    found = Path(path)
    try:
        mode = found.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{what} {found} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {found} cannot be opened: {reason(error)}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{what} {found} is a directory; a file was expected")
    if not stat.S_ISREG(mode):
        raise InputError(f"{what} {found} is not a regular file; save it to disk first")
    return found.absolute()


def open_media(path: FilePath, kind: Kind) -> InputContainer:
    """Open an audio or video file that has at least one stream of this kind.

    Playlists and other files that point elsewhere cannot make it reach the network.

    Raises:
        InputError: no such file, not a media file, or no stream of this kind in it.
    """
    found = existing_file(path, kind)
    try:
        container = av.open(str(found), "r", container_options={"protocol_whitelist": "file"})
    except av.error.InvalidDataError as error:
        raise InputError(f"{kind} {found} is not an audio or video file, or it is damaged") from error
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{kind} {found} cannot be opened: {reason(error)}") from error
    problem = _problem(container, kind)
    if problem:
        container.close()
        raise InputError(f"{kind} {found} {problem}")
    return container


@overload
def decode(container: InputContainer, kind: Literal["audio"]) -> Iterator[av.AudioFrame]: ...
@overload
def decode(container: InputContainer, kind: Literal["video"]) -> Iterator[av.VideoFrame]: ...
def decode(container: InputContainer, kind: Kind) -> Iterator[av.AudioFrame] | Iterator[av.VideoFrame]:
    """The frames of the best stream of this kind, one by one.

    Damaged packets are stepped over, as players do, and reported by one logged warning.

    Raises:
        InputError: the file cannot be read any further (an I/O error).
    """
    packets = container.demux(best_stream(container, kind))
    damaged = 0
    while (packet := _next_packet(packets, container, kind)) is not None:
        try:
            frames = cast(list[av.AudioFrame | av.VideoFrame], packet.decode())
        except av.FFmpegError:
            damaged += 1
            continue
        yield from frames
    if damaged:
        logger.warning("%s %s is damaged: %d packets left out", kind, container.name, damaged)


def best_stream(container: InputContainer, kind: Kind) -> av.AudioStream | av.VideoStream:
    """The stream of this kind that a player would choose; `open_media` has made sure that there is one."""
    stream = container.streams.best(kind)
    assert isinstance(stream, av.AudioStream | av.VideoStream)
    return stream


def reason(error: Exception) -> str:
    """The system's or FFmpeg's own words for an error, such as "Permission denied"."""
    return getattr(error, "strerror", None) or str(error)


def _next_packet(packets: Iterator[av.Packet], container: InputContainer, kind: Kind) -> av.Packet | None:
    try:
        return next(packets, None)
    except av.error.InvalidDataError:
        logger.warning("%s %s is damaged: nothing after this point can be read", kind, container.name)
        return None
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{kind} {container.name} cannot be read any further: {reason(error)}") from error


def _problem(container: InputContainer, kind: Kind) -> str | None:
    stream = container.streams.best(kind)
    if stream is None or stream.disposition & Disposition.attached_pic:
        return f"has no {kind} stream"
    if kind == "video" and container.format.name.endswith(_NOT_A_VIDEO):
        return "is not a video; a video file such as mp4, mov or webm was expected"
    return None
