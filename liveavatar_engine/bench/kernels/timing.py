"""How long a call takes on the device: events around replayed graphs, over inputs that do not fit in the cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from liveavatar_kernels import fp8_linear
from liveavatar_kernels.e4m3 import Quantized, quantize_rows

Body = Callable[[], object]

_REPLAY_US = 2_000.0
"""A replay holds calls that take about as long to launch one by one: what surrounds it does not count."""
_MOST_CALLS = 400
_WARM_UP_US = 20_000.0
_CACHE_TIMES = 4
"""Inputs and results of a rotation are this many times as large as the L2 cache."""
_MOST_SETS = 12
_ROUNDS = 5
"""In which implementations take turns, so that a GPU that becomes slower becomes so for all of them."""
_L2_BYTES = 50 << 20


class Clock(Protocol):
    """A device, as far as timing needs one."""

    def times(self, body: Body, repeats: int) -> list[float]:
        """Microseconds on the device that each of some runs of `body` took, by events."""

    def capture(self, body: Body) -> Body:
        """A function that replays what `body` launched.

        Raises:
            RuntimeError: it cannot be captured.
        """

    def reads_the_device(self, body: Body) -> bool:
        """Run `body`, and tell whether it made the host wait for the device."""


class CudaClock:
    """The current CUDA device."""

    def times(self, body: Body, repeats: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            start.record()
            body()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]

    def capture(self, body: Body) -> Body:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                body()
        finally:
            torch.cuda.synchronize()
        return graph.replay

    def reads_the_device(self, body: Body) -> bool:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            body()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        return False


class HostClock:
    """A CPU. What it measures is never reported as a kernel's performance."""

    def times(self, body: Body, repeats: int) -> list[float]:
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            body()
            found.append((time.perf_counter() - start) * 1e6)
        return found

    def capture(self, body: Body) -> Body:
        raise RuntimeError("a CPU has no graphs")

    def reads_the_device(self, body: Body) -> bool:
        body()
        return False


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Launcher:
    """Calls that are timed together.

    Attributes:
        how: "graph" or "launches".
        why: why not a graph.
    """

    body: Body
    calls: int
    how: str
    why: str | None = None


class Summary(NamedTuple):
    """Microseconds of a call."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Summary:
        p10, median, p90 = np.percentile(times, [10, 50, 90]).tolist()
        return cls(median, p10, p90)


def launcher(calls: Sequence[Body], clock: Clock) -> Launcher:
    """Warm up, and make one body of `calls` in turn, as often as fills a replay; results live through a turn."""
    turn = list(calls)

    def take_turns(turns: int) -> None:
        for _ in range(turns):
            kept = [call() for call in turn]
            del kept

    syncs = False
    for call in turn:
        call()
    syncs = clock.reads_the_device(turn[0])
    once = min(clock.times(lambda: take_turns(1), 3))
    turns = max(1, min(math.ceil(_REPLAY_US / max(once, 0.1)), _MOST_CALLS // len(turn)))
    plain = Launcher(lambda: take_turns(turns), turns * len(turn), "launches")
    if syncs:
        return Launcher(plain.body, plain.calls, plain.how, "it reads device values on the host")
    try:
        return Launcher(clock.capture(plain.body), plain.calls, "graph")
    except RuntimeError as error:
        return Launcher(plain.body, plain.calls, plain.how, f"capture failed: {first_line(error)}")


def measure(launchers: Sequence[Launcher], repeats: int, clock: Clock) -> list[Summary]:
    """Time of one call of each, over `repeats` runs or a few more; they take turns in a few rounds."""
    for one in launchers:
        spent = 0.0
        while spent < _WARM_UP_US:
            spent += max(sum(clock.times(one.body, 3)), _WARM_UP_US / 50)
    times: list[list[float]] = [[] for _ in launchers]
    for _ in range(_ROUNDS):
        for found, one in zip(times, launchers, strict=True):
            found += [time / one.calls for time in clock.times(one.body, -(-repeats // _ROUNDS))]
    return [Summary.of(found) for found in times]


def sets_beyond_cache(bytes_moved: int, cache_bytes: int = _L2_BYTES) -> int:
    """How many sets of inputs and results to rotate among, so that a call finds nothing of its own in the cache."""
    return max(1, min(_MOST_SETS, math.ceil(_CACHE_TIMES * cache_bytes / max(bytes_moved, 1))))


def cache_bytes(device: torch.device) -> int:
    """Of the device's L2 cache."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or _L2_BYTES


class Ceilings(NamedTuple):
    """What the device really does.

    Attributes:
        copy_gbps: of a large copy, bytes read and written.
        matmul_tflops: of a large product of random numbers in `dtype`.
        e4m3_tflops: of one in e4m3 with scales by row, by cuBLASLt; None where that cannot run.
        dtype: "bf16", on a CPU "fp32".
    """

    copy_gbps: float
    matmul_tflops: float
    e4m3_tflops: float | None = None
    dtype: str = "bf16"


def measure_ceilings(
    device: torch.device, clock: Clock, repeats: int, copy_bytes: int | None = None, side: int | None = None
) -> Ceilings:
    """All by the libraries that torch has; sizes that keep a GPU busy, or a CPU for a fraction of a second."""
    on_gpu = device.type == "cuda"
    copy_bytes = copy_bytes or (4 << 30 if on_gpu else 1 << 28)
    side = side or (8192 if on_gpu else 1024)
    source = torch.randint(0, 255, (copy_bytes // 2,), dtype=torch.uint8, device=device)
    target = source.clone()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = left @ right
    bodies: list[Body] = [lambda: target.copy_(source), lambda: torch.mm(left, right, out=out)]
    e4m3 = _e4m3_product(device, side)
    if e4m3 is not None:
        bodies.append(e4m3)
    copy, *products = measure([Launcher(body, 1, "launches") for body in bodies], repeats, clock)
    tflops = [2 * side**3 / product.median / 1e6 for product in products]
    return Ceilings(
        2 * source.nbytes / copy.median / 1e3,
        tflops[0],
        tflops[1] if e4m3 is not None else None,
        "bf16" if on_gpu else "fp32",
    )


def _e4m3_product(device: torch.device, side: int) -> Body | None:
    """A product in e4m3 by cuBLASLt, or None where it cannot run; a device that has it and fails raises."""
    if fp8_linear.OP["cublaslt"].absent(device) is not None:
        return None
    left, right = (Quantized(*quantize_rows(torch.randn(side, side, device=device))) for _ in range(2))
    return lambda: fp8_linear.fp8_linear(
        left, right.values, right.scale, None, dtype=torch.bfloat16, implementation="cublaslt"
    )


def first_line(error: BaseException) -> str:
    """What to show of an error in a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
