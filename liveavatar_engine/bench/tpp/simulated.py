"""A pipeline that is only simulated, from its stages' costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from ...config.geometry import FRAMES_PER_SECOND
from ...pipeline.tpp.simulate import BLOCK_SECONDS, Simulation, simulate
from ...pipeline.tpp.trace import rank_labels, write_chrome_trace
from ..results import SIMULATED, Figure, Run, Series
from .options import SUITE, TppOptions
from .picture import rows_of


def measure(options: TppOptions) -> Run:
    """Predict a pipeline; nothing is opened.

    Raises:
        ConfigError: there is no such layout.
        OutputError: the timeline cannot be written.
    """
    plan, costs = options.plan(), options.known.costs
    found = simulate(
        plan,
        costs,
        options.blocks,
        sessions=options.sessions,
        update_after=options.sink_update_after,
        paced=options.paced,
        network=options.network,
    )
    if options.trace is not None:
        write_chrome_trace(options.trace, found.spans, plan, f"simulated; {options.known.basis}")
    return _run_of(found, options)


def _run_of(found: Simulation, options: TppOptions) -> Run:
    labels = rank_labels(found.plan)
    intervals = [(after - before) * 1e3 for before, after in pairwise(found.delivered[0])]
    return Run(
        SUITE,
        options.as_dict(),
        SIMULATED,
        figures=(*_figures(found), *_shares(found, labels)),
        series=(Series("block_ms", "ms", "simulated: from block to block of the first session", tuple(intervals)),),
        rows=rows_of(found.spans, found.plan),
        notes=(options.known.basis, *_assumptions(options)),
    )


def _figures(found: Simulation) -> Iterator[Figure]:
    warm_ups, costs = found.warm_ups, found.costs
    yield Figure("fps", found.fps, "frames/s", "simulated: steady, all sessions together")
    yield Figure("real_time_factor", found.fps / FRAMES_PER_SECOND, "", f"steady over {FRAMES_PER_SECOND} frames/s")
    yield Figure("bottleneck_ms", found.plan.bottleneck(costs) * 1e3, "ms", "a block on the slowest stage")
    yield Figure("real_time_sessions", found.real_time_sessions, "", "sessions that could be served in real time")
    yield Figure("first_frame_s", found.first_frame, "s", "from a session's first audio to its first frames")
    yield Figure("early_first_frame_s", found.early_first_frame, "s", "the same with early_first_frame")
    yield Figure("warm_up_s", warm_ups.first, "s", "until every rank has work")
    yield Figure("second_warm_up_s", warm_ups.second, "s", "that the first rank waits for the new sink")


def _shares(found: Simulation, labels: dict[int, str]) -> Iterator[Figure]:
    for rank in found.utilisation():
        yield Figure(f"busy_{rank.rank}", rank.share, "share", f"{labels[rank.rank]}: busy, steady")


def _assumptions(options: TppOptions) -> Sequence[str]:
    notes = ["the decoder's and the sessions' opening cost nothing here; a transfer takes nothing from computing"]
    if options.sequence_parallel > 1:
        notes.append(f"{options.sequence_parallel} devices are taken to share a step evenly")
    if options.paced:
        notes.append(f"a block's audio comes every {BLOCK_SECONDS * 1e3:.0f} ms")
    return notes
