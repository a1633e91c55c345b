"""What callers hand in (paths, pictures, arrays) as what the engine works on.

Files are read through `liveavatar_engine.media`, imported only when a file is given: arrays need none of its libraries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..conditions.audio_encoder import AudioEncoder
from ..conditions.audio_features import GLOBAL_SECONDS, ActorFeatures, Features, GlobalFeatures, WindowedFeatures
from ..conditions.audio_window import AudioWindow
from ..conditions.speech import RecordedSpeech, as_samples
from ..config import Size
from ..config.geometry import SPEECH_RATE
from ..errors import InputError

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger(__name__)

AudioInput = str | Path | np.ndarray


def portrait(image: str | Path | Image.Image | np.ndarray, size: Size) -> np.ndarray:
    """The image at the size that the stream will have: uint8 [height, width, 3].

    Args:
        image: a file, a PIL image, or uint8 RGB [height, width, 3].
        size: exact, or an area within which the image's aspect ratio is kept.

    Raises:
        InputError: the image cannot be read, or no size fits.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise InputError(f"image: expected uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
        if size.exact and image.shape[:2] == (size.height, size.width):
            return image
    from PIL import Image

    from ..media.image import load_image, resize_and_crop

    if isinstance(image, np.ndarray):
        picture = Image.fromarray(image)
    else:
        picture = image.convert("RGB") if isinstance(image, Image.Image) else load_image(image)
    return resize_and_crop(picture, *size.sides(picture.height, picture.width))


def recorded_features(
    audio: AudioInput | Sequence[AudioInput],
    encoder: AudioEncoder,
    mode: str,
    columns_per_block: int,
    window: Callable[[], AudioWindow],
) -> Features:
    """Audio states of recorded speech, one recording per actor.

    "global" holds up to 60 s; when any actor's audio is longer, all are encoded "windowed", with what `window` gives.

    Raises:
        InputError: a recording cannot be read or is empty.
    """
    recordings = [audio] if isinstance(audio, AudioInput) else list(audio)
    if not recordings:
        raise InputError("audio: expected at least one recording")
    streams = [_speech_chunks(recording) for recording in recordings]
    limit = GLOBAL_SECONDS * SPEECH_RATE if mode == "global" else -1
    heads = [_up_to(chunks, limit) for chunks in streams]
    actors: list[Features]
    if all(sum(map(len, head)) <= limit for head in heads):
        actors = [GlobalFeatures(encoder, np.concatenate(head), columns_per_block) for head in heads]
    else:
        if mode == "global":
            _log.warning("audio longer than %d s: encoded in windows instead of as a whole", GLOBAL_SECONDS)
        actors = [
            WindowedFeatures(encoder, RecordedSpeech(chain(head, chunks)), columns_per_block, window())
            for head, chunks in zip(heads, streams, strict=True)
        ]
    return ActorFeatures(actors)


def actor_masks(masks: Sequence[str | Path | np.ndarray], height: int, width: int) -> list[np.ndarray]:
    """Masks as bool [height, width], from files or from arrays of that shape.

    Raises:
        InputError: a mask cannot be read or has another shape.
    """
    loaded = []
    for number, mask in enumerate(masks, 1):
        if isinstance(mask, np.ndarray):
            if mask.shape != (height, width):
                raise InputError(f"actor mask {number}: expected shape {[height, width]}, not {list(mask.shape)}")
            loaded.append(mask > 0)
        else:
            from ..media.image import load_mask

            loaded.append(load_mask(mask, height, width))
    return loaded


def pose_frames(video: str | Path, height: int, width: int, fps: int) -> Iterator[np.ndarray]:
    """Frames of a pose video at the stream's size: uint8 [height, width, 3] each, read as they are needed.

    Raises:
        InputError: the file is not a readable video; at the call, not at the first frame.
    """
    from PIL import Image

    from ..media.image import resize_and_crop
    from ..media.video import iter_video_frames, probe_video

    probe_video(video)
    return (resize_and_crop(Image.fromarray(frame), height, width) for frame in iter_video_frames(video, fps))


def _speech_chunks(recording: AudioInput) -> Iterator[np.ndarray]:
    """Float32 mono chunks at 16 kHz; the first is read at once, so that a bad file fails here."""
    if isinstance(recording, np.ndarray):
        samples = as_samples(recording)
        if not len(samples):
            raise InputError("audio samples: empty, expected at least one sample")
        return iter([samples])
    from ..media.audio import iter_speech

    chunks = iter_speech(recording)
    first = next(chunks, None)
    if first is None:
        raise InputError(f"{recording}: holds no audio samples")
    return chain([first], chunks)


def _up_to(chunks: Iterator[np.ndarray], limit: int) -> list[np.ndarray]:
    """Chunks until they hold more than `limit` samples or end."""
    head: list[np.ndarray] = []
    while sum(map(len, head)) <= limit and (chunk := next(chunks, None)) is not None:
        head.append(chunk)
    return head
