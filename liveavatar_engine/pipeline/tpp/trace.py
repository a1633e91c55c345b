"""What each rank did when: spans, collected in the workers, and the timeline that they make in a file."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...errors import InputError
from ...files import check_writable, write_atomically
from .plan import Plan

COMPUTE, WAIT, SEND, RECEIVE, DECODE, DELIVER = KINDS = ("compute", "wait", "send", "receive", "decode", "deliver")
"""Kinds of spans. COMPUTE is denoising and prefilling; WAIT is a stage with nothing to do; DELIVER brings frames to the
front."""
SPAN_LIMIT = 65_536
"""Spans that a tracer keeps, unless told otherwise: at ten per block, about 50 minutes of video."""
_SCHEMA, _VERSION = "liveavatar_engine.trace", 1


@dataclass(frozen=True)
class Span:
    """Something that a rank did for a while.

    Attributes:
        rank: that did it.
        kind: one of KINDS.
        start, end: seconds on a clock that all ranks share.
        session: that it was done for; -1: for none.
        block: of that session; -1: for none.
        name: what exactly, for people; "" where the kind says it.
    """

    rank: int
    kind: str
    start: float
    end: float
    session: int
    block: int
    name: str = ""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start

    def encode(self) -> list[Any]:
        """As plain values that JSON can hold."""
        return [self.rank, self.kind, self.start, self.end, self.session, self.block, self.name]

    @classmethod
    def decode(cls, values: Sequence[Any]) -> Span:
        """What `encode` made a list of.

        Raises:
            ValueError: it did not.
        """
        if len(values) != 7 or values[1] not in KINDS:
            raise ValueError(f"a span is [rank, kind, start, end, session, block, name], not {list(values)!r}")
        rank, kind, start, end, session, block, name = values
        return cls(int(rank), kind, float(start), float(end), int(session), int(block), str(name))


class Trace(Protocol):
    """What a worker reports its spans to: a `Tracer`, or `NoTrace`."""

    def span(self, kind: str, session: int, block: int, name: str = "") -> Any:
        """A context: its body is a span."""

    def add(self, kind: str, start: float, end: float, session: int, block: int, name: str = "") -> None:
        """A span that was timed elsewhere."""

    def drain(self) -> list[Span]:
        """What was added since the last call, in that order."""


class Tracer:
    """Collects a rank's spans; several threads may use it at once.

    Args:
        rank: whose spans these are.
        limit: spans kept between two calls of `drain`; the oldest give way, and `dropped` counts them.
        clock: seconds, the same on all ranks. `time.time` is shared by the processes of a machine, and about shared by
            machines that synchronise their clocks.
    """

    def __init__(self, rank: int, limit: int = SPAN_LIMIT, clock: Callable[[], float] = time.time) -> None:
        self.rank, self.clock, self.dropped = rank, clock, 0
        self._spans: deque[Span] = deque(maxlen=limit)
        self._lock = threading.Lock()

    @contextmanager
    def span(self, kind: str, session: int, block: int, name: str = "") -> Iterator[None]:
        """A context: its body is a span, also where it raises."""
        start = self.clock()
        try:
            yield
        finally:
            self.add(kind, start, self.clock(), session, block, name)

    def add(self, kind: str, start: float, end: float, session: int, block: int, name: str = "") -> None:
        """A span that was timed elsewhere, in seconds of the tracer's clock."""
        span = Span(self.rank, kind, start, end, session, block, name)
        with self._lock:
            self.dropped += len(self._spans) == self._spans.maxlen
            self._spans.append(span)

    def drain(self) -> list[Span]:
        """What was added since the last call, in that order."""
        with self._lock:
            spans = list(self._spans)
            self._spans.clear()
        return spans


class NoTrace:
    """A tracer that keeps nothing and takes no time."""

    @contextmanager
    def span(self, kind: str, session: int, block: int, name: str = "") -> Iterator[None]:
        """A context that does nothing."""
        yield

    def add(self, kind: str, start: float, end: float, session: int, block: int, name: str = "") -> None:
        """Keeps nothing."""

    def drain(self) -> list[Span]:
        """Nothing."""
        return []


def rank_labels(plan: Plan) -> dict[int, str]:
    """What a timeline calls each rank: "rank 2 · step 2 · cuda:2"."""
    return {rank.rank: f"rank {rank.rank} · {rank.stage} · {rank.device}" for rank in plan.ranks}


def write_chrome_trace(path: str | Path, spans: Sequence[Span], plan: Plan, note: str = "") -> None:
    """Write a timeline for ui.perfetto.dev or chrome://tracing: the whole file, or none.

    A rank is a process there, with a row for each kind of span (transfers go on under the computation). Arrows lead
    from a send to each receive of the same block.

    Args:
        path: of the JSON file.
        spans: of all ranks, on one clock.
        plan: names the ranks.
        note: kept in the file, such as "simulated".

    Raises:
        OutputError: the file cannot be written.
    """
    origin = min((span.start for span in spans), default=0.0)
    document = {
        "traceEvents": [*_names(rank_labels(plan), spans), *_slices(spans, origin), *_arrows(spans, origin)],
        "displayTimeUnit": "ms",
        "otherData": {"schema": _SCHEMA, "version": _VERSION, "origin": origin, "note": note},
    }
    check_writable(Path(path))
    write_atomically(Path(path), json.dumps(document, allow_nan=False))


def read_chrome_trace(path: str | Path) -> tuple[list[Span], dict[int, str]]:
    """What `write_chrome_trace` wrote: spans by their starts, to a nanosecond, and each rank's label.

    Raises:
        InputError: the file cannot be read or is no such timeline.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"trace {path}: {error}") from None
    about = document.get("otherData") if isinstance(document, dict) else None
    if not isinstance(about, dict) or (about.get("schema"), about.get("version")) != (_SCHEMA, _VERSION):
        raise InputError(f"trace {path}: expected a timeline that liveavatar-engine wrote, version {_VERSION}")
    try:
        events = document["traceEvents"]
        labels = {e["pid"]: e["args"]["name"] for e in events if (e["ph"], e["name"]) == ("M", "process_name")}
        spans = [_span(event, about["origin"]) for event in events if event["ph"] == "X"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"trace {path}: damaged: {type(error).__name__} {error}") from None
    return sorted(spans, key=lambda span: (span.start, span.rank)), labels


def _span(event: Mapping[str, Any], origin: float) -> Span:
    start = origin + event["ts"] / 1e6
    args = event["args"]
    values = (event["pid"], event["cat"], start, start + event["dur"] / 1e6, args["session"], args["block"])
    return Span.decode((*values, args["name"]))


def _names(labels: Mapping[int, str], spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    """Of processes and their rows; a row that would be empty has none."""
    rows = sorted({(span.rank, KINDS.index(span.kind)) for span in spans})
    for rank, label in labels.items():
        yield {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": label}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}}
    for rank, row in rows:
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": row, "args": {"name": KINDS[row]}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": row, "args": {"sort_index": row}}


def _slices(spans: Sequence[Span], origin: float) -> Iterator[dict[str, Any]]:
    for span in spans:
        what = span.name or span.kind
        yield {
            "ph": "X",
            "name": what if span.block < 0 else f"{what}, block {span.block}",
            "cat": span.kind,
            "pid": span.rank,
            "tid": KINDS.index(span.kind),
            "ts": _microseconds(span.start - origin),
            "dur": _microseconds(span.seconds),
            "args": {"session": span.session, "block": span.block, "name": span.name},
        }


def _arrows(spans: Sequence[Span], origin: float) -> Iterator[dict[str, Any]]:
    """From the last send of the same thing that another rank had begun, to each receive."""
    sends: dict[tuple[int, int, str], list[Span]] = defaultdict(list)
    for span in spans:
        if span.kind == SEND:
            sends[span.session, span.block, span.name].append(span)
    receives = (span for span in spans if span.kind == RECEIVE)
    for number, receive in enumerate(receives):
        same = sends.get((receive.session, receive.block, receive.name), ())
        begun = [send for send in same if send.rank != receive.rank and send.start <= receive.end]
        if not begun:
            continue
        send = max(begun, key=lambda span: span.start)
        ends = (("s", send, send.start), ("f", receive, max(send.start, receive.start)))
        for phase, span, moment in ends:
            yield {
                "ph": phase,
                "name": "latents",
                "cat": "transfer",
                "id": number,
                "pid": span.rank,
                "tid": KINDS.index(span.kind),
                "ts": _microseconds(moment - origin),
                **({"bp": "e"} if phase == "f" else {}),
            }


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
