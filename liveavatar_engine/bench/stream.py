"""The suite `stream`: the whole pipeline through the public API, from opening a session to frames on the host."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..conditions.audio_features import LOOK_AHEAD
from ..config import StreamGeometry
from ..config.geometry import FRAMES_PER_SECOND, SPEECH_RATE
from ..frames import FrameChunk
from ..pipeline.engine import Engine
from ..pipeline.session import Session
from ..synthetic import picture, speech
from .bench import Bench
from .results import Figure, Run, Series, percentile
from .settings import Settings

SUITE = "stream"
PROMPT = "A person talks to the camera."
STAGES = ("audio", "denoise", "decode")
"""Of `FrameChunk.timings`."""


@dataclass
class Measured:
    """A stream, as it came.

    Attributes:
        geometry: of the stream.
        opening: seconds to open the session.
        arrivals: seconds from the start of opening to each chunk.
        frames: of each chunk.
        timings: of each chunk, seconds by stage.
        memory: bytes, see `Bench.memory_bytes`.
        warm_up: chunks at the start that are left out of steady figures.
        blocks_under_way: calls that a block's latents take, 1 unless blocks overlap.
    """

    geometry: StreamGeometry
    opening: float
    warm_up: int
    blocks_under_way: int
    arrivals: list[float] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)
    memory: int = 0

    def add(self, chunk: FrameChunk, at: float, memory: int) -> None:
        self.arrivals.append(at)
        self.frames.append(len(chunk.frames))
        self.timings.append(chunk.timings)
        self.memory = max(self.memory, memory)

    @property
    def fps(self) -> float:
        """Frames over seconds from the start of the pipeline, opening included, as the paper counts them."""
        return sum(self.frames) / self.arrivals[-1]

    @property
    def block_seconds(self) -> list[float]:
        """From chunk to chunk, without warm-up."""
        pairs = zip([self.opening, *self.arrivals], self.arrivals, strict=False)
        return [end - start for start, end in pairs][self.warm_up :]

    @property
    def steady_fps(self) -> float:
        """Frames over seconds, without warm-up."""
        return sum(self.frames[self.warm_up :]) / sum(self.block_seconds)

    def stage(self, name: str) -> list[float]:
        """Seconds of a stage in each chunk, without warm-up."""
        return [timings.get(name, 0.0) for timings in self.timings[self.warm_up :]]

    @property
    def frame_wait(self) -> float:
        """Seconds from a moment to the next frame's, on average, at the rate at which frames are shown."""
        return 0.5 / min(FRAMES_PER_SECOND, self.steady_fps)

    @property
    def denoise(self) -> float:
        """Seconds that a block's latents take, median; where blocks overlap, all calls that it takes part in."""
        return self.blocks_under_way * percentile(self.stage("denoise"), 50)

    @property
    def decode(self) -> float:
        """Seconds, median."""
        return percentile(self.stage("decode"), 50)

    @property
    def ttff(self) -> float:
        """Time to first frame as the paper's supplement defines it: wait for the next frame, all steps, decode."""
        return self.frame_wait + self.denoise + self.decode

    @property
    def audio_wait(self) -> float:
        """Seconds of audio that must have been heard before a block can start, in real time."""
        blocks = self.blocks_under_way * self.geometry.seconds_per_block
        return blocks + LOOK_AHEAD / SPEECH_RATE


def measure(settings: Settings, bench: Bench) -> Run:
    """Run one session without a pause, in an engine that is warm."""
    bench.restart_memory()
    found = run_session(bench.engine(settings), settings, bench)
    deadline = found.geometry.seconds_per_block * 1e3
    seconds = Series("block_ms", "ms", "a block, from chunk to chunk", _ms(found.block_seconds), deadline)
    stages = tuple(
        Series(f"{name}_ms", "ms", f"{name} of a block", _ms(found.stage(name)))
        for name in STAGES
        if any(name in timings for timings in found.timings)
    )
    real_time = found.steady_fps / FRAMES_PER_SECOND
    return Run(
        SUITE,
        settings.as_dict(),
        warm_up=f"Engine.warm_up, a session of {settings.warm_up + 1} blocks; steady figures: {settings.warm_up} more",
        figures=(
            Figure("fps", found.fps, "frames/s", "whole pipeline, from opening the session (as the paper counts)"),
            Figure("steady_fps", found.steady_fps, "frames/s", "steady"),
            Figure("real_time_factor", real_time, "", f"steady over {FRAMES_PER_SECOND} frames/s"),
            Figure("ttff_s", found.ttff, "s", "time to first frame: wait for the next frame, steps, decode"),
            Figure("ttff_wait_s", found.frame_wait, "s", "of it: wait for the next frame, mean"),
            Figure("ttff_denoise_s", found.denoise, "s", "of it: all steps of a block, median"),
            Figure("ttff_decode_s", found.decode, "s", "of it: decode of a block, median"),
            Figure("first_frame_cold_s", found.arrivals[0], "s", "from opening a session to its first frames"),
            Figure("opening_s", found.opening, "s", "of it: opening (image encode, prefill, decoder priming)"),
            Figure("audio_wait_s", found.audio_wait, "s", "audio that a block waits for, in real time"),
            Figure("block_ms_p50", seconds.p50, "ms", "a block, median"),
            Figure("block_ms_p99", seconds.p99, "ms", "a block, p99"),
            Figure("deadline_misses", seconds.misses, "", f"blocks that took more than {deadline:.0f} ms"),
            Figure("memory_mb", found.memory / 2**20, "MiB", bench.memory_label),
        ),
        series=(seconds, *stages),
        notes=(
            "audio lies ready: what a live stream waits for it stands apart, in audio_wait",
            *(("a prompt's context is random: no text encoder runs",) if settings.preset else ()),
        ),
    )


def run_session(engine: Engine, settings: Settings, bench: Bench) -> Measured:
    """Warm `engine` up, then open a session and take warm-up and measured blocks.

    The engine remembers pictures: the session that is measured shows one that it has not seen.
    """
    geometry = settings.geometry()
    engine.warm_up((geometry.height, geometry.width))
    audio = speech(_audio_seconds(settings, geometry), settings.seed)
    with _open(engine, settings, geometry, blue=120) as session:
        session.push_audio(audio)
        for _ in range(settings.warm_up + 1):
            next(session)
    bench.synchronize()
    started = time.perf_counter()
    with _open(engine, settings, geometry, blue=60) as session:
        opening = time.perf_counter() - started
        overlap = settings.steps if engine.config.schedule == "diagonal" else 1
        found = Measured(geometry, opening, settings.warm_up, overlap)
        session.push_audio(audio)
        for _ in range(settings.warm_up + settings.blocks):
            chunk = next(session)
            found.add(chunk, time.perf_counter() - started, bench.memory_bytes())
    return found


def _open(engine: Engine, settings: Settings, geometry: StreamGeometry, blue: int) -> Session:
    return engine.open_session(picture(geometry.height, geometry.width, blue), PROMPT, seed=settings.seed)


def _audio_seconds(settings: Settings, geometry: StreamGeometry) -> float:
    """For all blocks of a session, those that follow the last one while it is under way, and the look-ahead."""
    blocks = settings.warm_up + settings.blocks + settings.steps
    return blocks * geometry.seconds_per_block + LOOK_AHEAD / SPEECH_RATE


def _ms(seconds: list[float]) -> tuple[float, ...]:
    return tuple(value * 1e3 for value in seconds)
