"""A pipeline without devices: when each stage would do what, from its costs alone.

The model of the runtime, event by event:

- A stage takes its blocks in order; a block is there once its transfer is done. Between two stages there are two
  receive buffers: a transfer begins when there is one, and the stage gives it back at the end of its work on the block.
- A transfer costs the sender nothing but one of its two send buffers. Where none is free a finished block waits in the
  stage, and the stage with it.
- At most `depth + 2` blocks of a session are on their way at once. The first stage takes sessions in turn.
- When the last denoise stage has finished a session's first block, its first latent goes to the first stage, and from
  there down the pipeline, behind the blocks that are on their way. A stage that has nothing else to do then prefills
  the new sink; any other does it before block `update_after`, which does not set out before the latent is known (the
  paper's Algorithm 4).

Times are whole nanoseconds inside, so that nothing depends on how seconds are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...config import StreamGeometry
from ...config.geometry import FRAMES_PER_SECOND, LATENT_FRAME_STRIDE
from ...errors import ConfigError
from .bubbles import Bubble, Utilisation, WarmUps, bubbles, utilisation, warm_ups
from .plan import Lane, Plan, StageCosts
from .simulated_lane import NANO, Clock, LaneRun, Network, Request, SessionState
from .trace import COMPUTE, WAIT, Span

FRAMES_PER_BLOCK = StreamGeometry.frames_per_block * LATENT_FRAME_STRIDE
BLOCK_SECONDS = FRAMES_PER_BLOCK / FRAMES_PER_SECOND


@dataclass(frozen=True)
class Simulation:
    """What would happen. Times are in seconds from when the first block's audio is there.

    Attributes:
        plan, costs, update_after: what was simulated.
        spans: of all ranks, by time.
        delivered: by session, when each block's frames are there.
        first_frames: by session, when the first latent's frames would be there if they were delivered early.
    """

    plan: Plan
    costs: StageCosts
    update_after: int | None
    spans: tuple[Span, ...]
    delivered: tuple[tuple[float, ...], ...]
    first_frames: tuple[float, ...]

    @property
    def first_frame(self) -> float:
        """Seconds to the first frame, of the session that waits longest."""
        return max(times[0] for times in self.delivered)

    @property
    def early_first_frame(self) -> float:
        """The same with `early_first_frame`."""
        return max(self.first_frames)

    @property
    def fps(self) -> float:
        """Frames per second of all sessions in the steady state, taken over the second half of each one's blocks.

        A single block has no steady state: its frames over its time.
        """
        return FRAMES_PER_BLOCK * sum(_rate(times) for times in self.delivered)

    @property
    def real_time_sessions(self) -> int:
        """How many sessions the layout could serve at 25 frames/s each."""
        return sum(real_time_sessions(lane, self.costs) for lane in self.plan.lanes)

    @property
    def warm_ups(self) -> WarmUps:
        """How long the pipeline takes to fill, at the start and when the sink changes."""
        return warm_ups(self.spans, self.update_after)

    def utilisation(self, steady: bool = True) -> list[Utilisation]:
        """Of each rank: in `steady_window`, or from start to end; also where there is no such window."""
        start, end = self.steady_window
        return utilisation(self.spans, (start, end) if steady and end > start else None, self._ranks)

    def bubbles(self) -> list[Bubble]:
        """Every gap of every rank."""
        return bubbles(self.spans, ranks=self._ranks)

    @property
    def _ranks(self) -> range:
        return range(len(self.plan))

    @property
    def steady_window(self) -> tuple[float, float]:
        """From the delivery of the middle block to the last delivery before a first stage begins its last block.

        These are whole blocks; it is empty for a short run.
        """
        start = max(times[(len(times) - 1) // 2] for times in self.delivered)
        begun = min(s.start for s in self.spans if s.kind == COMPUTE and s.block == len(self.delivered[0]) - 1)
        return start, max((time for time in self.delivered[0] if start < time <= begun), default=start)


def simulate(
    plan: Plan,
    costs: StageCosts,
    blocks: int,
    *,
    sessions: int = 1,
    update_after: int | None = 4,
    paced: bool = False,
    network: Network | None = None,
) -> Simulation:
    """Run sessions through a plan.

    Args:
        plan: who does what.
        costs: of the stages.
        blocks: of each session.
        sessions: that are opened at once; lanes, and decoders in them, take them in turn.
        update_after: blocks after which the first generated latent replaces the reference in the sink; None: never.
        paced: whether a block's audio comes every 0.48 s, as speech does; else all of it is there.
        network: where transfers are not all alike.

    Raises:
        ConfigError: a number is too small.
    """
    for name, count in (("blocks", blocks), ("sessions", sessions), ("update_after", update_after)):
        if count is not None and count < 1:
            raise ConfigError(f"{name} must be at least 1, not {count}")
    clock = Clock()
    states = [SessionState(number, blocks) for number in range(sessions)]
    request = Request(costs, update_after, BLOCK_SECONDS if paced else 0.0, network or Network())
    for number, lane in enumerate(plan.lanes):
        LaneRun(lane, states[number :: len(plan.lanes)], request, clock).start()
    clock.run()
    spans = sorted([*clock.spans, *_waits(clock.spans)], key=lambda span: (span.start, span.rank, span.end))
    return Simulation(
        plan,
        costs,
        update_after,
        tuple(spans),
        tuple(tuple(time / NANO for time in session.delivered) for session in states),
        tuple(session.first_frame / NANO for session in states),
    )


def real_time_sessions(lane: Lane, costs: StageCosts) -> int:
    """How many sessions a lane can serve at 25 frames/s each."""
    *stages, last = lane.seconds(costs)
    between = [costs.transfer] if len(lane.stages) > 1 and costs.transfer else []
    behind = [costs.transfer] if lane.decodes_apart and costs.transfer else []
    by_decoders = len(lane.decoders) * min(_fit(seconds) for seconds in (last, *behind))
    return min([by_decoders, *(_fit(seconds) for seconds in (*stages, *between))])


def _fit(seconds: float) -> int:
    """Blocks of these seconds in the time that one block plays."""
    return int(BLOCK_SECONDS / seconds * (1 + 1e-12))


def _rate(delivered: Sequence[float]) -> float:
    """Blocks per second."""
    first, last = (len(delivered) - 1) // 2, len(delivered) - 1
    if first == last:
        return 1 / delivered[0]
    return (last - first) / (delivered[last] - delivered[first])


def _waits(spans: Sequence[Span]) -> list[Span]:
    return [Span(b.rank, WAIT, b.start, b.end, b.session, b.block) for b in bubbles(spans) if b.block >= 0]
