"""Which device does which denoise steps, and which one decodes: chosen from what each costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from ...errors import ConfigError


@dataclass(frozen=True)
class StageCosts:
    """What a block costs on one device, in seconds.

    Attributes:
        step: one denoise step of the block.
        decode: of the block's latents.
        first_decode: of the first latent alone, where its frames are delivered early.
        prefill: of the sink, when its reference changes.
        transfer: of a block's latents from one stage to the next.
    """

    step: float
    decode: float
    first_decode: float
    prefill: float
    transfer: float = 0.0

    def __post_init__(self) -> None:
        for name in ("step", "decode", "first_decode", "prefill", "transfer"):
            value = getattr(self, name)
            least = "more than" if name in ("step", "decode") else "at least"
            if not math.isfinite(value) or value < 0 or (value == 0 and least == "more than"):
                raise ConfigError(f"cost of {name}: expected {least} 0 seconds, not {value!r}")

    @classmethod
    def of(cls, step_ms: float, vae_ms: float, transfer_ms: float = 0.0) -> StageCosts:
        """Costs of which only two or three are known, in milliseconds.

        The first latent is taken to cost a third of a block's decode (it is one of three latents), and a prefill one
        step: it goes through the same layers, with other tokens.
        """
        step, decode = step_ms / 1e3, vae_ms / 1e3
        return cls(step, decode, decode / 3, step, transfer_ms / 1e3)


@dataclass(frozen=True)
class RankPlan:
    """What one worker process does.

    Attributes:
        rank: its number; the index of `device` among the devices that the plan was made for.
        device: its name.
        lane: which lane it belongs to.
        steps: denoise steps that it does, one after another; empty where it only decodes.
        mate: its place among the ranks that share these steps (sequence parallel).
        decoder: which of the lane's decoders it is; None: it is none.
        mates: how many ranks share these steps.
    """

    rank: int
    device: str
    lane: int
    steps: range
    mate: int = 0
    decoder: int | None = None
    mates: int = 1

    @property
    def stage(self) -> str:
        """What it does, for people: "steps 0-1", "step 2 (1 of 2)", "step 3 + decode"."""
        done = []
        if self.steps:
            first, last = self.steps[0], self.steps[-1]
            done.append(f"step {first}" if first == last else f"steps {first}-{last}")
        if self.decoder is not None:
            done.append("decode")
        shared = f" ({self.mate + 1} of {self.mates})" if self.mates > 1 else ""
        return " + ".join(done) + shared


@dataclass(frozen=True)
class Lane:
    """Stages that a session's blocks go through; several lanes serve different sessions.

    Attributes:
        stages: denoise stages in order, each with the ranks that share it.
        decoders: each serves its own sessions; the only one may also be the first mate of the last denoise stage.
    """

    stages: tuple[tuple[RankPlan, ...], ...]
    decoders: tuple[RankPlan, ...]

    @property
    def ranks(self) -> tuple[RankPlan, ...]:
        """Of this lane, each once, in rank order."""
        found = {rank.rank: rank for rank in (*(rank for stage in self.stages for rank in stage), *self.decoders)}
        return tuple(found[rank] for rank in sorted(found))

    @property
    def decodes_apart(self) -> bool:
        """Whether decoding has devices of its own."""
        return not self.decoders[0].steps

    @property
    def depth(self) -> int:
        """Stages that a block goes through: denoise stages, and the decoder where it is a stage of its own."""
        return len(self.stages) + self.decodes_apart

    def seconds(self, costs: StageCosts) -> tuple[float, ...]:
        """What a block takes on each stage of its way; a step is shared evenly by mates."""
        return tuple(self._seconds(depth, costs) for depth in range(self.depth))

    def bottleneck(self, costs: StageCosts, sessions: int | None = None) -> float:
        """Seconds between two blocks in the steady state: the slowest stage, or the transfers where they are slower.

        Args:
            costs: of the stages.
            sessions: that are served at once. The decoder that has the most of them holds back the others, too: a stage
                waits with its blocks. None: as many as decoders, or a multiple.
        """
        decoders = len(self.decoders)
        busiest = 1 / decoders if sessions is None else -(-sessions // decoders) / sessions
        *stages, last = self.seconds(costs)
        between = costs.transfer if len(self.stages) > 1 else 0.0
        behind = costs.transfer if self.decodes_apart else 0.0
        return max(*stages, last * busiest, between, behind * busiest)

    def first_frame(self, costs: StageCosts, early: bool = False) -> float:
        """Seconds from a block's audio to its first frames when nothing is in front of it.

        Args:
            costs: of the stages.
            early: whether the first latent's frames are delivered before the rest is decoded (`early_first_frame`).
        """
        saved = costs.decode - costs.first_decode if early else 0.0
        return sum(self.seconds(costs)) + (self.depth - 1) * costs.transfer - saved

    def _seconds(self, depth: int, costs: StageCosts) -> float:
        if depth == len(self.stages):
            return costs.decode
        first = self.stages[depth][0]
        return len(first.steps) * costs.step / first.mates + (0.0 if first.decoder is None else costs.decode)


@dataclass(frozen=True)
class Plan:
    """Who does what.

    Attributes:
        lanes: at least one.
    """

    lanes: tuple[Lane, ...]

    @property
    def ranks(self) -> tuple[RankPlan, ...]:
        """Of all lanes, in rank order."""
        return tuple(sorted((rank for lane in self.lanes for rank in lane.ranks), key=lambda rank: rank.rank))

    def bottleneck(self, costs: StageCosts) -> float:
        """Seconds between two blocks in the steady state, of the slowest lane."""
        return max(lane.bottleneck(costs) for lane in self.lanes)

    def fps(self, costs: StageCosts, frames_per_block: int, sessions: int | None = None) -> float:
        """Frames per second of all lanes together in the steady state.

        Args:
            costs: of the stages.
            frames_per_block: video frames in a block.
            sessions: served at once, spread over the lanes in turn; a lane without a session makes nothing. None:
                as many for every decoder.
        """
        served = [None] * len(self.lanes) if sessions is None else _in_turn(sessions, len(self.lanes))
        rates = (1 / lane.bottleneck(costs, n) for lane, n in zip(self.lanes, served, strict=True) if n != 0)
        return frames_per_block * sum(rates)

    def __iter__(self) -> Iterator[RankPlan]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)


def make_plan(
    devices: Sequence[str], steps: int, costs: StageCosts, *, sequence_parallel: int = 1, max_sessions: int = 1
) -> Plan:
    """Spread denoise steps and the decoder over devices: every device has something to do.

    A lane is a pipeline of its own. In it steps are spread as evenly as they can be, and the decoder has a device of
    its own or shares the last denoise stage, whichever has the smaller bottleneck; its own, if both are alike. Where
    decoding is the bottleneck and there are sessions enough, a lane has several decoders.

    There are as few lanes as can use all devices: a lane with more stages has the shorter wait for a frame, since fewer
    sessions' blocks stand in each other's way. Among these the plan is the one with the most blocks per second in
    total. Costs are compared in nanoseconds.

    Args:
        devices: names; a rank is an index in this list, and stages that follow one another are neighbours.
        steps: denoise steps of a block, at least 1.
        costs: of a stage on one device.
        sequence_parallel: devices that share each denoise stage.
        max_sessions: sessions that can be open at once.

    Raises:
        ConfigError: a device is named twice, there are too few for `sequence_parallel`, or some would have nothing to
            do; it says what would make use of them.
    """
    for name, count in (("steps", steps), ("sequence_parallel", sequence_parallel), ("max_sessions", max_sessions)):
        if count < 1:
            raise ConfigError(f"{name} must be at least 1, not {count}")
    repeated = sorted({name for name in devices if devices.count(name) > 1})
    if repeated:
        raise ConfigError(f"devices: each has one worker, but named more than once: {', '.join(repeated)}")
    if not devices or len(devices) < sequence_parallel:
        raise ConfigError(
            f"{len(devices)} devices are too few: sequence_parallel={sequence_parallel} needs at least "
            f"{max(1, sequence_parallel)} for a denoise stage"
        )
    search = _Search(steps, costs, sequence_parallel)
    shapes = search.best(len(devices), max_sessions)
    if shapes is None:
        raise ConfigError(_idle(devices, steps, costs, sequence_parallel, max_sessions))
    return _plan(devices, shapes, sequence_parallel)


class _Shape(NamedTuple):
    """A lane without names: steps of each denoise stage, and decoders of their own; 0: the last stage decodes."""

    stages: tuple[int, ...]
    decoders: int


_Score = tuple[Fraction, Fraction, int, Fraction]
"""What is best has the most of: blocks per second, blocks per second with one session, lanes that decode apart, less
latency. Scores of lanes are added up."""
_NOTHING: _Score = (Fraction(0), Fraction(0), 0, Fraction(0))
_Found = dict[tuple[int, int], tuple[_Score, list[_Shape]]]
"""Devices and sessions -> the best lanes that need as many."""


class _Search:
    """Finds the best lanes for some number of devices."""

    def __init__(self, steps: int, costs: StageCosts, mates: int) -> None:
        self._steps, self._mates = steps, mates
        nanoseconds = (max(1, round(seconds * 1e9)) for seconds in (costs.step, costs.decode))
        self._step, self._decode = (Fraction(value) for value in nanoseconds)
        self._step /= mates
        self._transfer = Fraction(round(costs.transfer * 1e9))

    def best(self, devices: int, sessions: int) -> list[_Shape] | None:
        """The fewest lanes that use all devices, and of these the best; None: no lanes do."""
        found: _Found = {(0, 0): (_NOTHING, [])}
        for _ in range(min(devices, sessions)):
            found = self._one_more(found, devices, sessions)
            whole = [entry for (used, _), entry in found.items() if used == devices]
            if whole:
                _, shapes = max(whole, key=lambda entry: entry[0])
                return sorted(shapes, key=self._score, reverse=True)
        return None

    def _one_more(self, found: _Found, devices: int, sessions: int) -> _Found:
        """The best of every number of devices and sessions with one more lane."""
        longer: _Found = {}
        for (used, served), (score, shapes) in found.items():
            for size in range(1, devices - used + 1):
                for shape in self._lanes(size, sessions - served):
                    place = (used + size, served + max(1, shape.decoders))
                    total = _sum(score, self._score(shape))
                    if place not in longer or total > longer[place][0]:
                        longer[place] = (total, [*shapes, shape])
        return longer

    def _lanes(self, devices: int, sessions: int) -> list[_Shape]:
        """Every lane of this many devices worth a look; none without a session."""
        found = []
        for decoders in range(min(sessions, devices) + 1 if sessions else 0):
            stages, left = divmod(devices - decoders, self._mates)
            if left == 0 and 1 <= stages <= self._steps:
                shape = _Shape(_evenly(self._steps, stages), decoders) if decoders else self._shared(stages)
                slowest = max(shape.stages) * self._step
                if decoders < 2 or self._decode / (decoders - 1) > slowest:
                    found.append(shape)
        return found

    def _shared(self, stages: int) -> _Shape:
        """The lane whose last denoise stage decodes, too."""
        if stages == 1:
            return _Shape((self._steps,), 0)
        lasts = range(1, self._steps - stages + 2)
        shapes = [_Shape((*_evenly(self._steps - last, stages - 1), last), 0) for last in lasts]
        return min(shapes, key=lambda shape: sorted(self._seconds(shape), reverse=True))

    def _seconds(self, shape: _Shape) -> list[Fraction]:
        """Nanoseconds of a block on each stage, several decoders taken for one that is faster."""
        found = [steps * self._step for steps in shape.stages]
        if shape.decoders:
            return [*found, self._decode / shape.decoders]
        return [*found[:-1], found[-1] + self._decode]

    def _score(self, shape: _Shape) -> _Score:
        seconds, apart = self._seconds(shape), min(1, shape.decoders)
        between = self._transfer if len(shape.stages) > 1 else Fraction(0)
        behind = self._transfer if apart else Fraction(0)
        bottleneck = max(*seconds, between, behind / max(1, shape.decoders))
        alone = max(bottleneck, self._decode, behind)
        latency = self._steps * self._step + self._decode + (len(seconds) - 1) * self._transfer
        return 1 / bottleneck, 1 / alone, apart, -latency


def _sum(first: _Score, second: _Score) -> _Score:
    return first[0] + second[0], first[1] + second[1], first[2] + second[2], first[3] + second[3]


def _evenly(steps: int, stages: int) -> tuple[int, ...]:
    """Steps of each stage; those in front have one more."""
    each, more = divmod(steps, stages)
    return tuple(each + (stage < more) for stage in range(stages))


def _in_turn(sessions: int, lanes: int) -> list[int | None]:
    """Sessions of each lane."""
    return [sessions // lanes + (lane < sessions % lanes) for lane in range(lanes)]


def _plan(devices: Sequence[str], shapes: Sequence[_Shape], mates: int) -> Plan:
    ranks = iter(enumerate(devices))
    lanes = []
    for number, shape in enumerate(shapes):
        stages, begun = [], 0
        for depth, count in enumerate(shape.stages):
            decodes = not shape.decoders and depth == len(shape.stages) - 1
            steps = range(begun, begun + count)
            begun += count
            stages.append(
                tuple(
                    RankPlan(*next(ranks), number, steps, mate, 0 if decodes and mate == 0 else None, mates)
                    for mate in range(mates)
                )
            )
        decoders = tuple(RankPlan(*next(ranks), number, range(0), decoder=decoder) for decoder in range(shape.decoders))
        lanes.append(Lane(tuple(stages), decoders or (stages[-1][0],)))
    return Plan(tuple(lanes))


def _idle(devices: Sequence[str], steps: int, costs: StageCosts, mates: int, sessions: int) -> str:
    """What to say where some devices would have nothing to do."""
    count = len(devices)

    def usable(devices: int, mates: int, sessions: int) -> bool:
        return _Search(steps, costs, mates).best(devices, sessions) is not None

    used = next(n for n in range(count - 1, 0, -1) if usable(n, mates, sessions))
    remedies = [f"{used} devices"]
    more = next((n for n in range(sessions + 1, count + 1) if usable(count, mates, n)), None)
    if more is not None:
        remedies.append(f"max_sessions={more}")
    others = [n for n in range(1, count + 1) if n != mates and usable(count, n, sessions)]
    if others:
        remedies.append(f"sequence_parallel={min(others, key=lambda n: (abs(n - mates), n))}")
    return (
        f"{count} devices cannot all be used with {steps} steps, sequence_parallel={mates} and "
        f"max_sessions={sessions}: {', '.join(devices[used:])} would have nothing to do. Give {' or '.join(remedies)}"
    )
