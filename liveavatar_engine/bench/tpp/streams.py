"""Pipelines that really run: streams through worker processes, and beside them what the simulator says of the same."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ...conditions.audio_features import LOOK_AHEAD
from ...config import EngineConfig, StreamGeometry
from ...config.geometry import SPEECH_RATE
from ...pipeline.session import Session
from ...pipeline.tpp.bubbles import utilisation, warm_ups
from ...pipeline.tpp.many_devices import ManyDevices
from ...pipeline.tpp.plan import Plan, StageCosts
from ...pipeline.tpp.rehearsal import Silence, rehearsal, rehearsal_order, rehearsal_session
from ...pipeline.tpp.simulate import BLOCK_SECONDS, FRAMES_PER_BLOCK, simulate
from ...pipeline.tpp.trace import COMPUTE, DECODE, SEND, Span, rank_labels, write_chrome_trace
from ...synthetic import picture, speech
from ...weights.presets import PRESETS
from ..bench import Bench
from ..results import Figure, Run, Series, percentile
from ..settings import GPU_PRESET, Settings
from ..stream import PROMPT
from .options import SUITE, TppOptions
from .picture import rows_of

PREDICTED = "predicted_"
"""In front of a figure's name: the same, simulated from the stage times that were measured."""
_DENOISE, _PREFILL = "denoise", "prefill"
_WARM_UP_BLUE, _BLUE = 120, 60

OpenSession = Callable[[int, int, int], Session]
"""Opens a session: its number, its blocks, and the blue of its picture."""


@dataclass(frozen=True)
class Delivered:
    """A session's blocks, as they came, in seconds of `time.time`.

    Attributes:
        asked: when it was asked for.
        times: when each block's frames were all there.
        first: when the first frames were.
    """

    asked: float
    times: tuple[float, ...]
    first: float


@dataclass(frozen=True)
class Flow:
    """How blocks went through a pipeline, in seconds.

    Attributes:
        fps: frames per second of all sessions, without warm-up.
        intervals: from block to block of each session, without warm-up.
        first_block: from the first step of the first block until it is decoded.
        warm_up, second_warm_up: see `WarmUps`.
        busy: share of each rank, in the steady state.
        idle: of each rank, per block of a session, in the steady state.
    """

    fps: float
    intervals: tuple[float, ...]
    first_block: float
    warm_up: float
    second_warm_up: float
    busy: dict[int, float]
    idle: dict[int, float]

    @classmethod
    def of(
        cls,
        spans: Sequence[Span],
        times: Sequence[Sequence[float]],
        plan: Plan,
        leave_out: int,
        update_after: int | None,
    ) -> Flow:
        """From the spans of all ranks, and by session the times at which blocks were delivered, on the same clock."""
        work = [span for span in spans if span.kind == COMPUTE and span.name != _PREFILL]
        began = min(span.start for span in work)
        starts = [session[leave_out - 1] if leave_out else began for session in times]
        intervals = [
            after - before
            for start, session in zip(starts, times, strict=True)
            for before, after in pairwise([start, *session[leave_out:]])
        ]
        counted = len(times[0]) - leave_out
        rate = sum(counted / (session[-1] - start) for start, session in zip(starts, times, strict=True))
        last = min(span.start for span in work if span.block == len(times[0]) - 1)
        window = (max(starts), last) if last > max(starts) else None
        used = utilisation(spans, window, range(len(plan)))
        filled = warm_ups(spans, update_after)
        return cls(
            FRAMES_PER_BLOCK * rate,
            tuple(intervals),
            min(span.end for span in spans if span.kind == DECODE and span.block == 0) - began,
            *filled,
            {one.rank: one.share for one in used},
            {one.rank: (1 - one.share) * len(times) / rate for one in used},
        )


def measure_pipeline(options: TppOptions, settings: Settings, bench: Bench) -> Run:
    """Stream through an engine on several devices.

    Raises:
        LiveAvatarError: the engine cannot be opened, or a worker fails.
        OutputError: the timeline cannot be written.
    """
    costs = options.known.costs
    engine, runner = bench.pipeline(
        settings,
        trace=True,
        devices=options.devices,
        sequence_parallel=options.sequence_parallel,
        max_sessions=options.sessions,
        sink_update_after=options.sink_update_after,
        stage_ms=(costs.step * 1e3, costs.decode * 1e3),
    )
    geometry = settings.geometry()
    seconds = (settings.warm_up + settings.blocks) * geometry.seconds_per_block + LOOK_AHEAD / SPEECH_RATE
    audio = speech(seconds, settings.seed)

    def open_session(number: int, blocks: int, blue: int) -> Session:
        portrait = picture(geometry.height, geometry.width, blue + number % 10)
        return engine.generate(portrait, audio, PROMPT, seed=settings.seed + number, max_blocks=blocks)

    with engine:
        engine.warm_up((geometry.height, geometry.width))
        streamed = _stream(runner, open_session, options, settings, bench)
    prompts = () if settings.preset is None else ("a prompt's context is random: no text encoder runs",)
    return _run_of(options, settings, settings.as_dict(), runner.plan, *streamed, prompts)


def measure_rehearsal(options: TppOptions, settings: Settings, bench: Bench) -> Run:
    """Stream through worker processes whose stages sleep: what processes, links and buffers cost.

    Raises:
        ConfigError: there is no such layout.
        WorkerError: a worker has ended.
        OutputError: the timeline cannot be written.
    """
    config = EngineConfig(
        size=settings.size,
        devices=options.devices,
        steps=options.steps,
        sequence_parallel=options.sequence_parallel,
        max_sessions=options.sessions,
    )
    model = PRESETS[GPU_PRESET].model
    height, width = config.parsed_size.sides(1, 1)
    geometry = StreamGeometry(model, height, width)
    with rehearsal(config, options.known.costs, model, trace=True) as runner:

        def open_session(number: int, blocks: int, blue: int) -> Session:
            audio = Silence(geometry, blocks)
            return rehearsal_session(runner, rehearsal_order(geometry, audio, update_after=options.sink_update_after))

        plan, streamed = runner.plan, _stream(runner, open_session, options, settings, bench)
    notes = (
        f"stages sleep in processes of their own: what is measured is what these, their links and buffers cost, with "
        f"messages of the {GPU_PRESET} model's sizes at {settings.size}; {options.known.basis}",
    )
    known = {name: getattr(settings, name) for name in ("size", "warm_up")}
    return _run_of(options, settings, known, plan, *streamed, notes)


def _stream(
    runner: ManyDevices, open_session: OpenSession, options: TppOptions, settings: Settings, bench: Bench
) -> tuple[list[Span], list[Delivered]]:
    """Let a session warm everything up, and watch those that are measured."""
    for _ in open_session(0, settings.warm_up + 1, _WARM_UP_BLUE):
        pass
    runner.spans()
    blocks = settings.warm_up + settings.blocks
    bench.say(f"{len(runner.plan)} workers are warm; {options.sessions} x {blocks} blocks")
    started, found = time.time(), []
    with ThreadPoolExecutor(options.sessions, thread_name_prefix="bench") as pool:
        for number in range(options.sessions):
            asked = time.time()
            found.append(pool.submit(_watch, open_session(number, blocks, _BLUE), asked))
        delivered = [one.result() for one in found]
    lanes, ranks = len(runner.plan.lanes), runner.plan.ranks
    spans = [
        replace(span, session=span.session * lanes + ranks[span.rank].lane if span.session >= 0 else -1)
        for span in runner.spans()
        if span.start >= started
    ]
    return spans, delivered


def _watch(session: Session, asked: float) -> Delivered:
    times: dict[int, float] = {}
    first = None
    for chunk in session:
        times[chunk.index] = time.time()
        first = first or times[chunk.index]
    return Delivered(asked, tuple(times[index] for index in sorted(times)), first or asked)


def measured_costs(spans: Sequence[Span], plan: Plan, leave_out: int) -> StageCosts:
    """What stages took, by median; a prefill that no span shows counts as a step."""
    steady = [span for span in spans if span.block >= leave_out]
    shares = {rank.rank: len(rank.steps) / rank.mates for rank in plan.ranks}
    steps = [span.seconds / shares[span.rank] for span in steady if span.kind == COMPUTE and span.name == _DENOISE]
    decodes: dict[tuple[int, int], float] = defaultdict(float)
    for span in steady:
        if span.kind == DECODE:
            decodes[span.session, span.block] += span.seconds
    prefills = [s.seconds * plan.ranks[s.rank].mates for s in spans if s.kind == COMPUTE and s.name == _PREFILL]
    sends = [span.seconds for span in steady if span.kind == SEND]
    step, decode = percentile(steps, 50), percentile(list(decodes.values()), 50)
    prefill = percentile(prefills, 50) if prefills else step
    return StageCosts(step, decode, decode / 3, prefill, percentile(sends, 50) if sends else 0.0)


def _run_of(
    options: TppOptions,
    settings: Settings,
    known: Mapping[str, Any],
    plan: Plan,
    spans: list[Span],
    delivered: list[Delivered],
    notes: tuple[str, ...],
) -> Run:
    if options.trace is not None:
        write_chrome_trace(options.trace, spans, plan, "; ".join(("measured", *notes)))
    costs = measured_costs(spans, plan, settings.warm_up)
    blocks, after = settings.warm_up + settings.blocks, options.sink_update_after
    simulated = simulate(plan, costs, blocks, sessions=options.sessions, update_after=after)
    flow = Flow.of(spans, [one.times for one in delivered], plan, settings.warm_up, after)
    predicted = Flow.of(simulated.spans, simulated.delivered, plan, settings.warm_up, after)
    deadline = BLOCK_SECONDS * 1e3
    labels = rank_labels(plan)
    return Run(
        SUITE,
        {**known, **options.as_dict()},
        warm_up=f"a session of {settings.warm_up + 1} blocks; steady figures: {settings.warm_up} blocks more",
        figures=(
            *_figures(flow, labels),
            Figure("first_frame_s", max(one.first - one.asked for one in delivered), "s", "opening to first frames"),
            *(
                Figure(f"{name}_ms", getattr(costs, name) * 1e3, "ms", f"{label}, median of the spans")
                for name, label in _COSTS
            ),
            *(
                replace(figure, name=PREDICTED + figure.name, label=f"simulated from these: {figure.label}")
                for figure in _figures(predicted, labels)
            ),
        ),
        series=(Series("block_ms", "ms", "from block to block", tuple(one * 1e3 for one in flow.intervals), deadline),),
        rows=rows_of(spans, plan),
        notes=("the simulation is of this layout, with the stage times that were measured here", *notes),
    )


_COSTS = (("step", "a denoise step"), ("decode", "a block's decode"), ("prefill", "the sink"), ("transfer", "a send"))


def _figures(flow: Flow, labels: dict[int, str]) -> Iterator[Figure]:
    """Those that a simulation has, too."""
    blocks = [one * 1e3 for one in flow.intervals]
    yield Figure("fps", flow.fps, "frames/s", "steady, all sessions together")
    yield Figure("block_ms_p50", percentile(blocks, 50), "ms", "from block to block, median")
    yield Figure("block_ms_p99", percentile(blocks, 99), "ms", "from block to block, p99")
    yield Figure("first_block_s", flow.first_block, "s", "the first block, from its first step until it is decoded")
    yield Figure("warm_up_s", flow.warm_up, "s", "until every rank has work")
    yield Figure("second_warm_up_s", flow.second_warm_up, "s", "that the first rank waits for the new sink")
    for rank, share in flow.busy.items():
        yield Figure(f"busy_{rank}", share, "share", f"{labels[rank]}: busy, steady")
    for rank, seconds in flow.idle.items():
        yield Figure(f"bubbles_{rank}_ms", seconds * 1e3, "ms", f"{labels[rank]}: bubbles per block, steady")


def comparison(run: Run) -> list[tuple[str, float, float, str]]:
    """Label, measured, simulated and unit of every figure that has both."""
    return [
        (figure.label, figure.value, predicted, figure.unit)
        for figure in run.figures
        if figure.value is not None and (predicted := run.figure(PREDICTED + figure.name)) is not None
    ]
