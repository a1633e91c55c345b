"""The suite `step`: one denoise step, whole as streams run it, and stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import EngineConfig, StreamGeometry
from ..denoise.diagonal import open_stream
from ..denoise.executor import StepExecutor
from ..denoise.positions import Place, Scene
from ..denoise.stream import Conditions, LatentStream, SinkPolicy
from ..pipeline.device import resolve_precision
from ..pipeline.engine import Engine
from ..weights.random_parts import prompt_tokens
from . import work
from .bench import Bench, Marks
from .results import Figure, Run, Series, Stage, percentile
from .settings import Settings
from .stages import ONCE_PER_BLOCK, timed_stages

SUITE = "step"
_STAGE_BLOCKS = 2
_HOST_BLOCKS = 5
_SLOWER = 1.1
"""From here on, what an eager step takes beyond a real one is worth a note."""


@dataclass
class _Times:
    """Milliseconds, as measured.

    Attributes:
        blocks: whole blocks.
        steps: from the end of a step to the end of the next one.
        host: from call to return of taking a block, the device being idle.
        struct: writing where a block stands.
    """

    blocks: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    struct: list[float] = field(default_factory=list)


def measure(settings: Settings, bench: Bench) -> Run:
    """Run a stream's denoise steps, with a full ring and no change of the sink."""
    bench.ceilings  # noqa: B018 - measured before the weights take the memory
    bench.restart_memory()
    times, memory = _real(settings, bench)
    bench.free()
    stages, flops = _staged(settings, bench)
    return _run_of(settings, bench, times, stages, flops, memory)


def _real(settings: Settings, bench: Bench) -> tuple[_Times, int]:
    """Times of steps as streams run them, and the memory that this took."""
    executor = warm_executor(bench.engine(settings), settings)
    return run_blocks(executor, settings, bench), bench.memory_bytes()


def _staged(settings: Settings, bench: Bench) -> tuple[tuple[Stage, ...], float]:
    """Stages of steps that run without graphs, one after the other, and the operations of a step."""
    engine = bench.engine(settings, graphs=False, schedule="sequential")
    executor = warm_executor(engine, settings)
    works = _works(engine.config, executor.geometry, bench)
    return _stages(executor, settings, bench, works), work.total(works)


def warm_executor(engine: Engine, settings: Settings) -> StepExecutor:
    """What runs an engine's denoise steps, warm for streams of these settings."""
    geometry = settings.geometry()
    engine.warm_up((geometry.height, geometry.width))
    assert engine.executor is not None
    return engine.executor


def run_blocks(executor: StepExecutor, settings: Settings, bench: Bench) -> _Times:
    """Take blocks back to back, then a few on an idle device."""
    steps, marks, times = executor.steps, Marks(bench.device), _Times()
    blocks = RandomBlocks(executor, settings, observe=lambda block, step, velocity: marks.mark())
    with blocks.stream(settings.warm_up) as take:
        marks.clear()
        for _ in range(settings.blocks):
            marks.mark()
            take()
            marks.mark()
        intervals = marks.intervals_ms()
        for first in range(0, len(intervals), steps + 2):
            *within, after = intervals[first : first + steps + 1]
            times.blocks.append(sum(within) + after)
            times.steps += within[1:] or within
        if executor.diagonal:
            times.steps = [block / steps for block in times.blocks]
        for _ in range(min(_HOST_BLOCKS, settings.blocks)):
            bench.synchronize()
            started = time.perf_counter()
            take()
            times.host.append((time.perf_counter() - started) * 1e3)
            bench.synchronize()
            times.struct.append(blocks.write_place())
    return times


def _stages(
    executor: StepExecutor, settings: Settings, bench: Bench, works: Mapping[str, work.Work]
) -> tuple[Stage, ...]:
    """Time some blocks without graphs. Stages per step in a fixed order; what is done once per block comes last."""
    blocks = RandomBlocks(executor, settings)
    count = min(_STAGE_BLOCKS, settings.blocks)
    with blocks.stream(executor.geometry.blocks_per_clip) as take:
        bench.synchronize()
        with timed_stages(executor.denoiser.network, executor.geometry.block_shape) as times:
            for _ in range(count):
                take()
            found = times()
    steps = count * executor.steps
    made = [
        work.stage(
            name, found.ms[name] / steps, found.calls[name] / steps, works.get(name), bench.limits, bench.ceilings
        )
        for name in (*work.STEP_STAGES, work.REMAINDER)
        if name in found.ms
    ]
    if ONCE_PER_BLOCK in found.ms:
        ms, calls = found.ms[ONCE_PER_BLOCK] / count, found.calls[ONCE_PER_BLOCK] / count
        made.append(Stage(ONCE_PER_BLOCK, ms, calls, per_block=True))
    return tuple(made)


class RandomBlocks:
    """A stream of random blocks on an executor's first slot."""

    def __init__(
        self,
        executor: StepExecutor,
        settings: Settings,
        observe: Callable[[int, int, Tensor], None] | None = None,
    ) -> None:
        self._executor, self._settings, self._observe = executor, settings, observe
        network, geometry = executor.denoiser.network, executor.geometry
        model = network.config
        generator = torch.Generator().manual_seed(settings.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        channels, _, height, width = geometry.block_shape
        self._noise = normal(*geometry.block_shape)
        self._audio = normal(1, model.audio_layers, model.audio_dim, geometry.columns_per_block).to(network.device)
        context = normal(prompt_tokens(model.text_len), model.text_dim).to(network.device, network.dtype)
        motion = normal(channels, 19, height, width) if geometry.motion_tokens else None
        self._conditions = Conditions(context, normal(channels, 1, height, width), motion)

    @contextmanager
    def stream(self, warm_up: int) -> Iterator[Callable[[], None]]:
        """An open stream, as a function that takes its next block; the sink never changes.

        `warm_up` blocks have been taken by then; in a diagonal stream all steps are under way, too.
        """
        policy = SinkPolicy("random", None, self._settings.seed)
        stream = open_stream(self._executor, 0, self._conditions, policy, observe=self._observe)

        def take() -> None:
            stream.push(self._noise, self._audio)

        try:
            for _ in range(warm_up + (self._executor.steps if self._executor.diagonal else 0)):
                take()
            yield take
        finally:
            stream.drain()
            stream.close()

    def prefill_ms(self) -> float:
        """Milliseconds to prefill a new sink at once, as a pipeline's stage does when it waits for the latent."""
        executor, marks = self._executor, Marks(self._executor.denoiser.network.device)
        stream = LatentStream(executor, 0, self._conditions, SinkPolicy("random", 1, self._settings.seed))
        try:
            stream.push(self._noise, self._audio)
            marks.mark()
            stream.prepare()
            marks.mark()
            return marks.intervals_ms()[0]
        finally:
            stream.close()

    def write_place(self) -> float:
        """Milliseconds on the host to write where a block stands; the next block writes it again."""
        arena = self._executor.arena
        slot = arena.scene_slots(0)[0]
        scene = Scene(slot, slot, 0, self._executor.geometry.model.text_len)
        places = [Place(arena.ring_slot(0, step), 0, 0, 4, scene) for step in range(self._executor.steps)]
        started = time.perf_counter()
        with torch.inference_mode():
            self._executor.place(places, self._noise)
        return (time.perf_counter() - started) * 1e3


def _works(config: EngineConfig, geometry: StreamGeometry, bench: Bench) -> Mapping[str, work.Work]:
    """What a step needs in an engine's precisions."""
    precision = resolve_precision(config, bench.device)
    width = precision.dtype.itemsize
    weight = 1 if precision.fp8_skip is not None else width
    keys = min(geometry.model.text_len, prompt_tokens(geometry.model.text_len) + 1)
    return work.step_work(geometry, keys, widths=work.Widths(width, weight, precision.cache.itemsize))


def _run_of(
    settings: Settings, bench: Bench, times: _Times, stages: tuple[Stage, ...], flops: float, memory: int
) -> Run:
    geometry = settings.geometry()
    on_gpu = bench.device.type == "cuda"
    steps = Series("step_ms", "ms", "a denoise step", tuple(times.steps))
    blocks = Series("block_ms", "ms", "all steps of a block", tuple(times.blocks), geometry.seconds_per_block * 1e3)
    in_stages = sum(one.ms for one in stages if not one.per_block)
    notes = [
        "stages: operations timed one by one, without graphs; the step: as streams run it, graphs included",
        f"a prompt of {prompt_tokens(geometry.model.text_len)} random tokens, one actor, full rings",
    ]
    if settings.schedule == "diagonal":
        notes.append(f"diagonal: a call takes one step with each of {settings.steps} blocks; a step is its share")
    if in_stages > _SLOWER * steps.p50:
        notes.append(f"the stages add up to {in_stages / steps.p50:.2f} steps: their shares are upper bounds")
    return Run(
        SUITE,
        settings.as_dict(),
        warm_up=f"warm-up of the engine and {settings.warm_up} blocks; stages: {geometry.blocks_per_clip} blocks",
        figures=(
            Figure("step_ms_p50", steps.p50, "ms", "a denoise step, median"),
            Figure("step_ms_p99", steps.p99, "ms", "a denoise step, p99"),
            Figure("step_p99_over_p50", steps.p99 / steps.p50, "", "p99 over median"),
            Figure("block_ms_p50", blocks.p50, "ms", "all steps of a block, median"),
            Figure("block_ms_p99", blocks.p99, "ms", "all steps of a block, p99"),
            Figure("step_tflops", flops / steps.p50 / 1e9, "TFLOP/s", f"a step, of {flops / 1e12:,.3g} TFLOP"),
            Figure("stages_ms", in_stages, "ms", "sum of the stages of a step"),
            Figure(
                "host_ms_p50",
                percentile(times.host, 50) if on_gpu else None,
                "ms",
                "host, from call to return of taking a block" + ("" if on_gpu else " (on a CPU: the block itself)"),
            ),
            Figure("struct_ms_p50", percentile(times.struct, 50), "ms", "host, writing where a block stands"),
            Figure("memory_mb", memory / 2**20, "MiB", bench.memory_label),
        ),
        series=(steps, blocks),
        stages=stages,
        notes=tuple(notes),
    )
