"""The suite `tpp`: denoise steps and decoder over several devices; until now simulated only.

What is shown is made of a run's rows, one for each span of a rank's timeline, wherever the spans come from.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.text import Text

from ..config.geometry import FRAMES_PER_SECOND
from ..errors import ConfigError
from ..pipeline.tpp.bubbles import bubbles
from ..pipeline.tpp.plan import Plan, make_plan
from ..pipeline.tpp.simulate import BLOCK_SECONDS, Simulation, simulate
from ..pipeline.tpp.simulated_lane import PREFILL, Network
from ..pipeline.tpp.trace import COMPUTE, DECODE, WAIT, Span, rank_labels, write_chrome_trace
from . import plots
from .bench import Bench
from .layout import KnownCosts, add_cost_arguments, device_names, known_costs
from .plots import Piece
from .results import SIMULATED, Figure, Run, Series

SUITE = "tpp"
CAPTION = "What each rank does when (the paper's Figure 8)"
_OPTIONS = (
    *("simulate", "devices", "step_ms", "vae_ms", "transfer_ms", "node_transfer_ms", "costs", "sessions"),
    *("sequence_parallel", "sink_update_after", "devices_per_node", "nodes", "paced", "trace"),
)
_DRAWN_BLOCKS = 16
"""Blocks of a session that a picture shows."""
_TURNS = 6
"""Colours of blocks, one after another."""
_COLUMNS = 110
_TERMINAL_COLOURS = ("blue", "dark_orange3", "green", "magenta", "cyan", "yellow")


@dataclass(frozen=True)
class TppOptions:
    """What the suite asks for.

    Attributes:
        simulate: predict, instead of running workers.
        devices: names; a rank is an index.
        known: what the stages cost, and how that is known.
        steps, sequence_parallel, sessions, sink_update_after: as of `EngineConfig`; sessions are opened at once.
        blocks: of each session.
        paced: whether audio comes as it is spoken.
        network: which devices share a machine.
        trace: file for a timeline, or None.
    """

    simulate: bool
    devices: tuple[str, ...]
    known: KnownCosts
    steps: int
    blocks: int
    sequence_parallel: int = 1
    sessions: int = 1
    sink_update_after: int | None = 4
    paced: bool = False
    network: Network = field(default_factory=Network)
    trace: Path | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> TppOptions:
        """What `add_arguments` has read.

        Raises:
            ConfigError: something is missing, contradicts another thing or is out of range.
            InputError: the file with costs cannot be used.
        """
        if arguments.devices is None:
            raise ConfigError("the suite tpp needs --devices, such as --devices 5")
        for name in ("preset", "checkpoint", "lora", "vae"):
            if arguments.simulate and getattr(arguments, name) is not None:
                raise ConfigError(f"--{name}: --simulate opens no model; it needs --step-ms and --vae-ms, or --costs")
        names = device_names(arguments.devices)
        between = arguments.node_transfer_ms
        return cls(
            bool(arguments.simulate),
            names,
            known_costs(arguments),
            arguments.steps,
            arguments.blocks,
            1 if arguments.sequence_parallel is None else arguments.sequence_parallel,
            1 if arguments.sessions is None else arguments.sessions,
            _update_after(arguments.sink_update_after),
            bool(arguments.paced),
            Network(_devices_per_node(arguments, len(names)), None if between is None else between / 1e3),
            arguments.trace,
        )

    def as_dict(self) -> dict[str, Any]:
        """For a document."""
        return {
            "simulated": self.simulate,
            "devices": len(self.devices),
            "device_names": list(self.devices),
            "steps": self.steps,
            "blocks": self.blocks,
            "sequence_parallel": self.sequence_parallel,
            "sessions": self.sessions,
            "sink_update_after": self.sink_update_after,
            "paced": self.paced,
            **{f"{name}_seconds": seconds for name, seconds in asdict(self.known.costs).items()},
            **asdict(self.network),
        }

    def plan(self) -> Plan:
        """The layout.

        Raises:
            ConfigError: there is none.
        """
        return make_plan(
            self.devices,
            self.steps,
            self.known.costs,
            sequence_parallel=self.sequence_parallel,
            max_sessions=self.sessions,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's arguments."""
    group = parser.add_argument_group("suite tpp")
    group.add_argument("--simulate", action="store_true", default=None, help="predict from costs; needs no device")
    group.add_argument("--devices", metavar="N|A,B...", help="how many GPUs, or which")
    add_cost_arguments(group)
    group.add_argument("--node-transfer-ms", type=float, metavar="X", help="latents to another machine")
    group.add_argument("--nodes", type=int, metavar="N", help="machines that share the devices evenly")
    group.add_argument("--devices-per-node", type=int, metavar="N", help="the same, by devices of a machine")
    group.add_argument("--sessions", type=int, metavar="N", help="opened at once (default 1)")
    group.add_argument("--sequence-parallel", type=int, metavar="K", help="devices that share a step (default 1)")
    group.add_argument("--sink-update-after", metavar="N", help="blocks, or never (default 4)")
    group.add_argument("--paced", action="store_true", default=None, help="audio comes as it is spoken")
    group.add_argument("--trace", type=Path, metavar="F", help="timeline for ui.perfetto.dev")


def check_unused(arguments: argparse.Namespace) -> None:
    """Refuse the suite's arguments where another one runs.

    Raises:
        ConfigError: one is given.
    """
    for name in _OPTIONS:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} belongs to the suite tpp, not to {arguments.suite}")


def measure(options: TppOptions, bench: Bench) -> Run:
    """Predict, or run, a pipeline.

    Raises:
        ConfigError: there is no such layout, or only `--simulate` could answer.
        OutputError: the timeline cannot be written.
    """
    if not options.simulate:
        return run_tpp(options, bench)
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


def run_tpp(options: TppOptions, bench: Bench) -> Run:
    """Run a pipeline's workers on real devices.

    Raises:
        ConfigError: always, until there are workers.
    """
    raise ConfigError("tpp needs --simulate: this version has no pipeline over several devices to run")


def timeline(run: Run) -> str:
    """A run's picture as SVG, of its first blocks, with a legend."""
    spans, labels = _drawn(run)
    rows: dict[str, list[Piece]] = {label: [] for label in labels.values()}
    for span in spans:
        rows[labels[span.rank]].append(_piece(span))
    entries = {f"blocks, {_TURNS} colours in turn": "turn0", "the sink's prefill": "prefill", "bubble": "bubble"}
    return plots.timeline(rows, "ms", "time") + plots.legend(entries, None)


def text_timeline(run: Run) -> Iterator[Text]:
    """The same for a terminal: a line per rank, a block's last digit where it is worked on."""
    spans, labels = _drawn(run)
    if not spans:
        return
    column = max(span.end for span in spans) / _COLUMNS
    room = max(len(label) for label in labels.values())
    shown = min(_DRAWN_BLOCKS, int(run.settings["blocks"]))
    yield Text(f"{run.status}: the first {shown} blocks, {column * 1e3:.3g} ms a column, p: prefill, ·: bubble")
    for rank, label in labels.items():
        line = Text(f"{label:<{room}} ")
        own = [span for span in spans if span.rank == rank and span.kind != WAIT]
        for number in range(_COLUMNS):
            middle = (number + 0.5) * column
            line.append(*_cell(next((span for span in own if span.start <= middle < span.end), None)))
        yield line


def _cell(span: Span | None) -> tuple[str, str]:
    """A character and its style."""
    if span is None:
        return "·", "dim"
    if span.name == PREFILL:
        return "p", "dim"
    return str(span.block % 10), _TERMINAL_COLOURS[span.block % _TURNS]


def _piece(span: Span) -> Piece:
    start, end = span.start * 1e3, span.end * 1e3
    what = "bubble before" if span.kind == WAIT else f"{span.name or span.kind},"
    told = f"{what} block {span.block} of session {span.session}: {start:,.5g} to {end:,.5g} ms"
    if span.kind == WAIT:
        return Piece(start, end, "bubble", told)
    if span.name == PREFILL:
        return Piece(start, end, "prefill", told)
    return Piece(start, end, f"turn{span.block % _TURNS}", told, str(span.block))


def rows_of(spans: Sequence[Span], plan: Plan) -> tuple[dict[str, Any], ...]:
    """A run's rows, from spans on any clock: times in seconds from the first one."""
    labels, origin = rank_labels(plan), min((span.start for span in spans), default=0.0)
    moved = (replace(span, start=span.start - origin, end=span.end - origin) for span in spans)
    return tuple({"label": labels[span.rank], **asdict(span)} for span in moved)


def _drawn(run: Run) -> tuple[list[Span], dict[int, str]]:
    """What a picture shows: work until the first blocks are decoded, the bubbles in between, and the ranks' labels."""
    labels = dict(sorted((row["rank"], row["label"]) for row in run.rows))
    values = ("rank", "kind", "start", "end", "session", "block", "name")
    spans = [Span.decode([row[name] for name in values]) for row in run.rows if row["kind"] in (COMPUTE, DECODE)]
    end = max((span.end for span in spans if span.kind == DECODE and span.block < _DRAWN_BLOCKS), default=0.0)
    work = [span for span in spans if span.end <= end]
    gaps = (gap for gap in bubbles(work, (0.0, end), labels) if gap.block >= 0)
    return work + [Span(gap.rank, WAIT, gap.start, gap.end, gap.session, gap.block) for gap in gaps], labels


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


def _update_after(text: str | None) -> int | None:
    if text is None:
        return 4
    if text == "never":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--sink-update-after: expected blocks, at least 1, or never, not {text!r}")
    return int(text)


def _devices_per_node(arguments: argparse.Namespace, devices: int) -> int | None:
    if arguments.nodes is None:
        return arguments.devices_per_node
    if arguments.devices_per_node is not None:
        raise ConfigError("--nodes and --devices-per-node say the same; give one of them")
    if arguments.nodes < 1 or devices % arguments.nodes:
        raise ConfigError(
            f"--nodes {arguments.nodes}: {devices} devices cannot be shared evenly; --devices-per-node can"
        )
    return devices // arguments.nodes
