"""A very long stream on a small model: memory, block time and latent statistics must not drift.

python -m bench.endurance                         10,000 s of video (20,834 blocks), half an hour on two CPU cores
python -m bench.endurance --seconds 60            a quick look
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from liveavatar_engine import Engine, EngineConfig, Session
from liveavatar_engine.config.geometry import SPEECH_RATE
from liveavatar_engine.weights.create import create_checkpoint
from liveavatar_engine.weights.presets import PRESETS

MARKS = (0, 100, 1_000, 10_000)
"""Seconds of video at which the stream is measured."""
WINDOW = 50
"""Blocks over which each measurement is taken."""
MEMORY_GROWTH_MB = 8
TIME_RATIO = 1.25
STATISTICS_DRIFT = 0.1
"""Largest change of a latent's mean or standard deviation, in standard deviations."""


@dataclass(frozen=True)
class Measurement:
    """The stream around one mark."""

    seconds: float
    block: int
    memory_mb: float
    block_ms: float
    latent_mean: float
    latent_std: float


def run(session: Session, seconds: float, console: Console) -> list[Measurement]:
    """Play `seconds` of noise-like speech into a live session and measure around every mark."""
    blocks = -(-round(seconds * 25) // 12)
    marks = {min(int(mark / session.seconds_per_block), blocks - WINDOW): mark for mark in MARKS if mark <= seconds}
    rng = np.random.default_rng(0)
    samples = round(session.seconds_per_block * SPEECH_RATE)
    chunks, measurements, window = iter(session), [], _Window()
    session.push_audio(_speech(rng, samples))
    for block in track(range(blocks), "streaming", console=console):
        session.push_audio(_speech(rng, samples))
        start = time.perf_counter()
        next(chunks)
        window.add(time.perf_counter() - start, session.last_latents)
        if block + 1 - WINDOW in marks:
            first = block + 1 - WINDOW
            measurements.append(window.measurement(marks[first], first))
    return measurements


def drifts(measurements: list[Measurement]) -> list[str]:
    """What is not flat, as sentences. The first mark's window holds warm-up and the sink's change: it is no base."""
    base, *later = measurements[1:] if len(measurements) > 2 else measurements
    found = []
    for one in later:
        at = f"at {one.seconds:,.0f} s against {base.seconds:,.0f} s"
        if one.memory_mb - base.memory_mb > MEMORY_GROWTH_MB:
            found.append(f"memory grew by {one.memory_mb - base.memory_mb:.1f} MB {at}")
        if one.block_ms > TIME_RATIO * base.block_ms:
            found.append(f"a block takes {one.block_ms / base.block_ms:.2f} times as long {at}")
        if abs(one.latent_mean - base.latent_mean) > STATISTICS_DRIFT * base.latent_std:
            found.append(f"the latents' mean moved from {base.latent_mean:.3f} to {one.latent_mean:.3f} {at}")
        if abs(one.latent_std - base.latent_std) > STATISTICS_DRIFT * base.latent_std:
            found.append(f"the latents' deviation moved from {base.latent_std:.3f} to {one.latent_std:.3f} {at}")
    return found


def table(measurements: list[Measurement]) -> str:
    """The measurements as a Markdown table."""
    rows = [
        f"| {m.seconds:,.0f} | {m.block:,} | {m.memory_mb:.0f} | {m.block_ms:.1f} "
        f"| {m.latent_mean:+.4f} | {m.latent_std:.4f} |"
        for m in measurements
    ]
    head = "| at (s) | block | memory (MB, RSS) | block time (ms, median) | latent mean | latent std |"
    return "\n".join([head, "|---:|---:|---:|---:|---:|---:|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float(MARKS[-1]) + 0.32, help="of video (default 10,000)")
    parser.add_argument("--size", default="64x64", help="default %(default)s")
    parser.add_argument("--checkpoint", type=Path, help="default: a tiny one, made for the run")
    parser.add_argument("--out", type=Path, help="Markdown page to write the table to")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    started, commit = time.perf_counter(), _commit()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or Path(folder) / "tiny"
        if arguments.checkpoint is None:
            create_checkpoint(checkpoint, PRESETS["tiny"])
        engine = Engine.from_pretrained(checkpoint, config=EngineConfig(size=arguments.size, features="windowed"))
        with engine.open_session(_picture(arguments.size), "a person talks") as session:
            measurements = run(session, arguments.seconds, console)
    page = f"{table(measurements)}\n\n{_conditions(engine, commit, time.perf_counter() - started)}\n"
    console.print(page, markup=False, soft_wrap=True)
    if arguments.out is not None:
        arguments.out.write_text(f"{_HEAD}\n{page}", encoding="utf-8")
    found = drifts(measurements)
    for sentence in found:
        console.print(f"NOT FLAT: {sentence}", soft_wrap=True)
    return 1 if found else 0


class _Window:
    """Times and latent statistics of the last WINDOW blocks."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._means: list[float] = []
        self._stds: list[float] = []

    def add(self, seconds: float, latents: torch.Tensor | None) -> None:
        assert latents is not None
        for values, value in (
            (self._times, seconds),
            (self._means, float(latents.mean())),
            (self._stds, float(latents.std())),
        ):
            values.append(value)
            del values[:-WINDOW]

    def measurement(self, seconds: float, block: int) -> Measurement:
        return Measurement(
            seconds, block, _memory_mb(), float(np.median(self._times)) * 1e3, _mean(self._means), _mean(self._stds)
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _memory_mb() -> float:
    """Resident memory of this process now (not its peak), or device memory where there is a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _speech(rng: np.random.Generator, samples: int) -> np.ndarray:
    return (rng.standard_normal(samples) * 0.1).astype(np.float32)


def _picture(size: str) -> np.ndarray:
    width, height = (int(side) for side in size.replace("*", "x").split("x"))
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack((rows % 256, columns % 256, (rows + columns) % 256), axis=-1).astype(np.uint8)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _conditions(engine: Engine, commit: str, seconds: float) -> str:
    device = torch.cuda.get_device_name() if engine.device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    return (
        f"Commit {commit}; {device}; Python {platform.python_version()}, "
        f"torch {torch.__version__}; `python -m bench.endurance {' '.join(sys.argv[1:])}`; {seconds / 60:.0f} minutes. "
        f"Each row is over {WINDOW} blocks. A CPU's block time says nothing about a GPU; that it stays the same does."
    )


_HEAD = """# Endurance

What `make endurance` measured: one live session on the tiny model, far past frame 45,000 of the latent stream, where
the reference ends. Memory, time and the latents' statistics must stay as they are; the command fails when they drift.
"""

if __name__ == "__main__":
    sys.exit(main())
