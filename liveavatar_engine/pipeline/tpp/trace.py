"""What each rank did when: spans, collected in the workers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

COMPUTE, WAIT, SEND, RECEIVE, DECODE, DELIVER = KINDS = ("compute", "wait", "send", "receive", "decode", "deliver")
"""Kinds of spans. COMPUTE is denoising and prefilling; WAIT is a stage with nothing to do; DELIVER brings frames to the
front."""
SPAN_LIMIT = 65_536
"""Spans that a tracer keeps, unless told otherwise: at ten per block, about 50 minutes of video."""


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
