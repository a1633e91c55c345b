"""Small media files made on the spot, and what a player would make of a finished one."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from liveavatar_engine.media import Mp4Writer

HEIGHT, WIDTH = 64, 96
AAC_FRAME = 1024
PLANAR = {"float32": "fltp", "float64": "dblp", "uint8": "u8p", "int16": "s16p", "int32": "s32p"}


def tone(seconds: float, rate: int, frequency: float = 440.0, level: float = 0.5) -> np.ndarray:
    """float32 [samples]."""
    return (level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(samples: int, channels: int = 1, level: float = 0.3, seed: int = 0) -> np.ndarray:
    """float32 [channels, samples]."""
    return (level * np.random.default_rng(seed).uniform(-1, 1, (channels, samples))).astype(np.float32)


def write_sound(
    path: Path, samples: np.ndarray, rate: int, codec: str = "pcm_f32le", layout: str | None = None
) -> Path:
    """Samples, float32 or the codec's own integers, [n] or [channels, n], to a file of the suffix's format."""
    samples = np.atleast_2d(samples)
    layout = layout or {1: "mono", 2: "stereo"}[len(samples)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples), format=PLANAR[samples.dtype.name], layout=layout
        )
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for converted in av.AudioResampler(format=stream.format.name, layout=layout, rate=rate).resample(frame):
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    return path


def write_pictures(path: Path, frames: np.ndarray, fps: Fraction | int, codec: str = "libx264") -> Path:
    """Frames, uint8 [T, H, W, 3], nearly lossless."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "1"} if codec == "libx264" else {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def grey(levels: list[int] | np.ndarray, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Uniform frames, uint8 [len(levels), height, width, 3]."""
    shape = (len(levels), height, width, 3)
    return np.ascontiguousarray(np.broadcast_to(np.asarray(levels, np.uint8)[:, None, None, None], shape))


@dataclass(frozen=True)
class Played:
    """A finished file as a player sees it: when each frame and the sound's first sample is presented, in seconds."""

    pictures: np.ndarray  # uint8 [T, H, W, 3]
    times: list[float]
    sound: np.ndarray  # float32 [channels, samples]
    sound_start: float
    sound_rate: int
    metadata: dict[str, str]


def play(path: Path) -> Played:
    with av.open(str(path)) as container:
        metadata = dict(container.metadata)
        frames = list(container.decode(video=0))
    pieces = []
    with av.open(str(path)) as container:
        if container.streams.audio:
            pieces = list(container.decode(audio=0))
    return Played(
        pictures=np.stack([frame.to_ndarray(format="rgb24") for frame in frames]),
        times=[frame.time for frame in frames],
        sound=np.concatenate([piece.to_ndarray() for piece in pieces], axis=1) if pieces else np.zeros((0, 0)),
        sound_start=pieces[0].time if pieces else 0.0,
        sound_rate=pieces[0].sample_rate if pieces else 0,
        metadata=metadata,
    )


def write_blocks(writer: Mp4Writer, levels: list[int], start: int = 3) -> None:
    """As the engine does: 9 frames from column 3 on, then 12 at a time."""
    ends = [9, *range(21, len(levels) + 12, 12)]
    for begin, end in zip([0, *ends], ends, strict=False):
        writer.write(grey(levels[begin:end]), start + begin)


def left_behind(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())
