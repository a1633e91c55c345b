"""What each rank does when, as a picture: of a run's rows, one for each span of a rank, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.text import Text

from ...pipeline.tpp.bubbles import bubbles
from ...pipeline.tpp.plan import Plan
from ...pipeline.tpp.simulated_lane import PREFILL
from ...pipeline.tpp.trace import COMPUTE, DECODE, WAIT, Span, rank_labels
from .. import plots
from ..plots import Piece
from ..results import Run

CAPTION = "What each rank does when (the paper's Figure 8)"
_DRAWN_BLOCKS = 16
"""Blocks of a session that a picture shows."""
_TURNS = 6
"""Colours of blocks, one after another."""
_COLUMNS = 110
_TERMINAL_COLOURS = ("blue", "dark_orange3", "green", "magenta", "cyan", "yellow")


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
    mode, scale = run.settings.get("mode", run.status), f"{column * 1e3:.3g} ms a column"
    yield Text(f"{mode}: the first {shown} blocks, {scale}, p: prefill, ·: bubble")
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
