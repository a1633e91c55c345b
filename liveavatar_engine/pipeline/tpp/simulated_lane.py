"""The machinery of the simulation: a clock, links between stages, stages, and the sessions of a lane.

The model is described in `simulate`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from ...errors import ConfigError
from .plan import Lane, RankPlan, StageCosts
from .trace import COMPUTE, DECODE, DELIVER, RECEIVE, SEND, Span

NANO = 1_000_000_000
SPARE_BLOCKS = 2
"""Blocks of a session on their way beyond the stages that they go through."""
PREFILL, FIRST_LATENT = "prefill", "first latent"
"""Names of spans."""
_BUFFERS = 2


@dataclass(frozen=True)
class Network:
    """How far ranks are from one another.

    Attributes:
        devices_per_node: ranks 0 to this are the first machine, and so on; None: all are one machine.
        node_transfer: seconds of a transfer between machines; None: as within one.
    """

    devices_per_node: int | None = None
    node_transfer: float | None = None

    def __post_init__(self) -> None:
        if self.devices_per_node is not None and self.devices_per_node < 1:
            raise ConfigError(f"devices_per_node must be at least 1, not {self.devices_per_node}")
        if self.node_transfer is not None and self.node_transfer < 0:
            raise ConfigError(f"node_transfer must be at least 0 seconds, not {self.node_transfer}")

    def transfer(self, first: RankPlan, second: RankPlan, costs: StageCosts) -> float:
        """Seconds of a block's latents from one rank to another."""
        if first.rank == second.rank:
            return 0.0
        here = self.devices_per_node
        far = here is not None and first.rank // here != second.rank // here
        return self.node_transfer if far and self.node_transfer is not None else costs.transfer


class Request(NamedTuple):
    """What is simulated; see `simulate`. A session's audio for a block comes every `block_seconds`."""

    costs: StageCosts
    update_after: int | None
    block_seconds: float
    network: Network


@dataclass
class SessionState:
    """Where a session stands; times in nanoseconds."""

    number: int
    blocks: int
    begun: int = 0
    first_frame: int = 0
    delivered: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Block:
    session: SessionState
    index: int


@dataclass(frozen=True)
class _FirstLatent:
    """What the last denoise stage has made of a session's first block."""

    session: SessionState
    index: int = 0


_Item = _Block | _FirstLatent


class Clock:
    """Does what was asked for, in order of time and of asking."""

    def __init__(self) -> None:
        self.now = 0
        self.spans: list[Span] = []
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._asked = 0

    def at(self, time: int, action: Callable[[], None]) -> None:
        """Do something at a time, in nanoseconds."""
        heapq.heappush(self._events, (time, self._asked, action))
        self._asked += 1

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something some seconds from now."""
        self.at(self.now + round(seconds * NANO), action)

    def run(self) -> None:
        """Go on until nothing is left to do."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()

    def span(self, ranks: Sequence[RankPlan], kind: str, seconds: float, item: _Item, name: str = "") -> None:
        """Something that takes some seconds from now on."""
        start, end = self.now / NANO, (self.now + round(seconds * NANO)) / NANO
        self.spans += [Span(rank.rank, kind, start, end, item.session.number, item.index, name) for rank in ranks]


class _Link:
    """From a stage to one that follows it."""

    def __init__(self, sender: _Stage, receiver: _Stage, seconds: float, clock: Clock) -> None:
        self._sender, self._receiver, self._seconds, self._clock = sender, receiver, seconds, clock
        self._waiting: deque[_Item] = deque()
        self._send_buffers = self._receive_buffers = _BUFFERS
        self._moving = False

    def take(self, block: _Block) -> bool:
        """Put a block into a send buffer; False where none is free."""
        if not self._send_buffers:
            return False
        self._send_buffers -= 1
        self._waiting.append(block)
        self._move()
        return True

    def tell(self, latent: _FirstLatent) -> None:
        """Pass a first latent on, behind the blocks so far; it needs no buffer."""
        self._waiting.append(latent)
        self._move()

    def give_back(self) -> None:
        """The receiver is done with a block."""
        self._receive_buffers += 1
        self._move()

    def _move(self) -> None:
        if self._moving or not self._waiting:
            return
        item = self._waiting[0]
        name = ""
        if isinstance(item, _FirstLatent):
            name = FIRST_LATENT
        elif not self._receive_buffers:
            return
        else:
            self._receive_buffers -= 1
        self._moving = True
        self._waiting.popleft()
        self._clock.span(self._sender.ranks[:1], SEND, self._seconds, item, name)
        self._clock.span(self._receiver.ranks, RECEIVE, self._seconds, item, name)
        self._clock.after(self._seconds, partial(self._arrived, item))

    def _arrived(self, item: _Item) -> None:
        self._moving = False
        self._send_buffers += isinstance(item, _Block)
        self._receiver.inbox.append((item, self))
        self._receiver.poke()
        self._sender.poke()
        self._move()


class _Stage:
    """One stage of a lane: denoise steps, decoding, or both."""

    def __init__(self, lane: LaneRun, ranks: tuple[RankPlan, ...]) -> None:
        self.ranks, self.inbox = ranks, deque[tuple[_Item, _Link | None]]()
        self.links: list[_Link] = []
        self._lane, self._costs = lane, lane.request.costs
        self._decodes = ranks[0].decoder is not None
        self._seconds = len(ranks[0].steps) * self._costs.step / len(ranks)
        self._busy = False
        self._held: _Block | None = None
        self._known: set[int] = set()
        self._prefilled: set[int] = set()

    def take(self, latent: _FirstLatent) -> None:
        """A session's first latent is here, behind what came before."""
        self.inbox.append((latent, None))
        self.poke()

    def knows(self, block: _Block) -> bool:
        """Whether the first latent is here, if a block sees a sink that is made of it."""
        after = self._lane.request.update_after
        return not self.ranks[0].steps or after is None or block.index < after or block.session.number in self._known

    def poke(self) -> None:
        """Begin whatever can be begun."""
        if self._held is not None and self._hand_on(self._held):
            self._held = None
        if self._busy or self._held is not None:
            return
        if not self.inbox:
            self._lane.offer(self)
        if not self.inbox:
            return
        item, link = self.inbox[0]
        if isinstance(item, _FirstLatent):
            self.inbox.popleft()
            self._learn(item)
        elif self._must_prefill(item):
            self._prefill(item.session)
        elif self.knows(item):
            self.inbox.popleft()
            self._work(self._seconds, COMPUTE, item, partial(self._denoised, item, link))

    def _learn(self, latent: _FirstLatent) -> None:
        """Pass it on, and prefill the new sink if there is nothing else to do."""
        self._known.add(latent.session.number)
        if self is not self._lane.last:
            self.links[0].tell(latent)
        if not self.inbox:
            self._lane.offer(self)
        if self.inbox:
            self.poke()
        else:
            self._prefill(latent.session)

    def _must_prefill(self, block: _Block) -> bool:
        after = self._lane.request.update_after
        number = block.session.number
        return block.index == after and number in self._known and number not in self._prefilled

    def _prefill(self, session: SessionState) -> None:
        def done() -> None:
            self._prefilled.add(session.number)

        assert self._lane.request.update_after is not None
        block = _Block(session, self._lane.request.update_after)
        self._work(self._costs.prefill / len(self.ranks), COMPUTE, block, done, PREFILL)

    def _denoised(self, block: _Block, link: _Link | None) -> None:
        if block.index == 0 and self is self._lane.last:
            self._lane.send_first_latent(block.session)
        if self._decodes:
            early = self._lane.clock.now + round(self._costs.first_decode * NANO)
            block.session.first_frame = block.session.first_frame or early
            self._work(self._costs.decode, DECODE, block, partial(self._decoded, block, link))
            return
        if link is not None:
            link.give_back()
        if not self._hand_on(block):
            self._held = block

    def _decoded(self, block: _Block, link: _Link | None) -> None:
        self._lane.clock.span(self.ranks[:1], DELIVER, 0.0, block)
        if link is not None:
            link.give_back()
        self._lane.deliver(block)

    def _hand_on(self, block: _Block) -> bool:
        return self.links[self._lane.decoder_of(block.session) if len(self.links) > 1 else 0].take(block)

    def _work(self, seconds: float, kind: str, block: _Block, then: Callable[[], None], name: str = "") -> None:
        def done() -> None:
            self._busy = False
            then()
            self.poke()

        self._busy = True
        if kind == DECODE or self.ranks[0].steps:
            self._lane.clock.span(self.ranks[:1] if kind == DECODE else self.ranks, kind, seconds, block, name)
        self._lane.clock.after(seconds, done)


class LaneRun:
    """A lane and its sessions."""

    def __init__(self, lane: Lane, sessions: list[SessionState], request: Request, clock: Clock) -> None:
        self.request, self.clock = request, clock
        self._lane, self._sessions = lane, deque(sessions)
        self._decoder = {session.number: place % len(lane.decoders) for place, session in enumerate(sessions)}
        self._stages = [_Stage(self, ranks) for ranks in lane.stages]
        self.last = self._stages[-1]
        for first, second in zip(self._stages, self._stages[1:], strict=False):
            self._connect(first, second)
        if lane.decodes_apart:
            for rank in lane.decoders:
                self._connect(self.last, _Stage(self, (rank,)))

    def start(self) -> None:
        """Let the first stage begin, and again whenever audio comes."""
        most = max((session.blocks for session in self._sessions), default=0)
        for block in range(most if self.request.block_seconds else min(most, 1)):
            self.clock.at(self._available(block), self._stages[0].poke)

    def offer(self, stage: _Stage) -> None:
        """Give the first stage the next block of the session whose turn it is."""
        if stage is not self._stages[0]:
            return
        for _ in range(len(self._sessions)):
            session = self._sessions[0]
            self._sessions.rotate(-1)
            block = _Block(session, session.begun)
            on_their_way = session.begun - len(session.delivered)
            if (
                session.begun < session.blocks
                and on_their_way < self._lane.depth + SPARE_BLOCKS
                and self._available(session.begun) <= self.clock.now
                and stage.knows(block)
            ):
                session.begun += 1
                stage.inbox.append((block, None))
                return

    def send_first_latent(self, session: SessionState) -> None:
        """From the last denoise stage to the first one, which passes it on."""
        if self.request.update_after is None:
            return
        first, latent = self._stages[0], _FirstLatent(session)
        seconds = self.request.network.transfer(self.last.ranks[0], first.ranks[0], self.request.costs)
        if first is not self.last:
            self.clock.span(self.last.ranks[:1], SEND, seconds, latent, FIRST_LATENT)
            self.clock.span(first.ranks, RECEIVE, seconds, latent, FIRST_LATENT)
        self.clock.after(seconds, partial(first.take, latent))

    def deliver(self, block: _Block) -> None:
        """A block's frames are there."""
        block.session.delivered.append(self.clock.now)
        self._stages[0].poke()

    def decoder_of(self, session: SessionState) -> int:
        """Which decoder a session has."""
        return self._decoder[session.number]

    def _available(self, block: int) -> int:
        return round(block * self.request.block_seconds * NANO)

    def _connect(self, first: _Stage, second: _Stage) -> None:
        seconds = self.request.network.transfer(first.ranks[0], second.ranks[0], self.request.costs)
        first.links.append(_Link(first, second, seconds, self.clock))
