"""How well ranks are used: their busy share of a window, and the gaps in between, from spans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .trace import COMPUTE, DECODE, Span

Window = tuple[float, float]
"""From and to, in seconds of the spans' clock."""


@dataclass(frozen=True)
class Utilisation:
    """What a rank did with its time.

    Attributes:
        rank: whose.
        busy: seconds of computing and decoding; where both go on at once they count once.
        seconds: of the window.
    """

    rank: int
    busy: float
    seconds: float

    @property
    def share(self) -> float:
        """Busy over all."""
        return self.busy / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Bubble:
    """A gap in which a rank computes nothing.

    Attributes:
        rank: whose.
        start, end: seconds.
        session, block: that the rank goes on with after it; -1: nothing more comes.
    """

    rank: int
    start: float
    end: float
    session: int
    block: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.start


class WarmUps(NamedTuple):
    """Seconds in which the pipeline fills.

    Attributes:
        first: from the first rank's first work until the last rank has some.
        second: that a session's first rank has nothing to do before the block with the new sink; of several sessions
            the longest.
    """

    first: float
    second: float


def window_of(spans: Iterable[Span]) -> Window:
    """From the first work to the end of the last; (0.0, 0.0) where there is none."""
    busy = _work(spans)
    return min((span.start for span in busy), default=0.0), max((span.end for span in busy), default=0.0)


def utilisation(
    spans: Sequence[Span], window: Window | None = None, ranks: Iterable[int] | None = None
) -> list[Utilisation]:
    """Of each rank, in rank order.

    Args:
        spans: of all of them.
        window: that is looked at; None: that of all spans.
        ranks: to tell of, also where they did nothing; None: those that have a span.
    """
    start, end = window or window_of(spans)
    return [
        Utilisation(rank, sum(stop - begin for begin, stop, _ in _busy(spans, rank, (start, end))), end - start)
        for rank in _ranks(spans, ranks)
    ]


def bubbles(spans: Sequence[Span], window: Window | None = None, ranks: Iterable[int] | None = None) -> list[Bubble]:
    """Every gap of each rank within a window, by rank and time; arguments as of `utilisation`."""
    start, end = window or window_of(spans)
    found = []
    for rank in _ranks(spans, ranks):
        idle = start
        for begin, stop, span in _busy(spans, rank, (start, end)):
            if begin > idle:
                found.append(Bubble(rank, idle, begin, span.session, span.block))
            idle = stop
        if end > idle:
            found.append(Bubble(rank, idle, end, -1, -1))
    return found


def warm_ups(spans: Sequence[Span], update_after: int | None) -> WarmUps:
    """How long the pipeline takes to fill, at the start and again when the sink changes.

    Args:
        spans: of all ranks.
        update_after: the first block that sees the new sink; None: the sink stays.
    """
    gaps, start = bubbles(spans), window_of(spans)[0]
    head = {span.session: span.rank for span in sorted(_work(spans), key=lambda span: -span.start)}
    first = [gap.seconds for gap in gaps if gap.start == start and gap.block >= 0]
    second: dict[int, float] = defaultdict(float)
    for gap in gaps:
        if gap.start > start and gap.block == update_after and head[gap.session] == gap.rank:
            second[gap.session] += gap.seconds
    return WarmUps(max(first, default=0.0), max(second.values(), default=0.0))


def _ranks(spans: Iterable[Span], ranks: Iterable[int] | None) -> list[int]:
    return sorted({span.rank for span in spans} if ranks is None else set(ranks))


def _work(spans: Iterable[Span]) -> list[Span]:
    return [span for span in spans if span.kind in (COMPUTE, DECODE)]


def _busy(spans: Sequence[Span], rank: int, window: Window) -> list[tuple[float, float, Span]]:
    """When a rank works within a window, without overlaps, each with the span that it begins with."""
    found: list[tuple[float, float, Span]] = []
    for span in sorted((span for span in _work(spans) if span.rank == rank), key=lambda span: span.start):
        start, end = max(span.start, window[0]), min(span.end, window[1])
        if end <= start:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]), found[-1][2])
        else:
            found.append((start, end, span))
    return found
