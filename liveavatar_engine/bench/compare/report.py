"""What a comparison found: times of both sides, their ratio, the difference of what they compute, and the stand-ins."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from ..results import Figure, Run, Series, percentile
from ..settings import Settings
from .job import SINK_DISTANCE, UPDATE_AFTER, Measured

SUITE = "compare"
OWN, UNROUNDED = "reference", "reference without its own roundings"
"""What the engine's output is compared with."""

_LIMITS = {"fp8": 0.3, "bf16": 0.1, "fp32": 1e-2}
"""Relative L2 of latents that is too much to be rounding, by the coarser of both precisions, which come first."""
_UNROUNDED_LIMIT = 1e-4
"""The same in float32 without the reference's roundings."""

IN_EACH_STEP = (
    "audio encoding, with the keys, values and AdaLN of the audio injectors",
    "text embedding, with the keys and values of the prompt in every layer",
    "time embedding, and modulation repeated for every token",
    "tables of rotary angles, written by the host",
    "the sink's keys rotated anew in every layer, ring and sink copied into one buffer",
)
"""What the reference does in every step, all of it within the time of its steps."""
AT_OTHER_TIMES = (
    "audio: once per block, counted to the block's first step",
    "text: once per prompt",
    "time: once per engine",
    "angles: once per block, the sink's keys when it changes",
)
"""When the engine does the same."""


@dataclass(frozen=True)
class Side:
    """One side's figures.

    Attributes:
        precision: of its linear layers.
        mode: "eager", "torch.compile" or "CUDA graphs".
        measured: times and stand-ins.
        steps: of a block.
    """

    precision: str
    mode: str
    measured: Measured
    steps: int

    @property
    def block_ms(self) -> tuple[float, ...]:
        """All steps of each block, with what is done once per block."""
        laps = self.measured.step_ms
        return tuple(sum(laps[first : first + self.steps]) for first in range(0, len(laps), self.steps))

    @property
    def step_p50(self) -> float:
        return percentile(self.measured.step_ms, 50)

    @property
    def step_p99(self) -> float:
        return percentile(self.measured.step_ms, 99)

    @property
    def step_share(self) -> float:
        """A block over its steps: what is done once per block is shared by all of them; the median of all blocks."""
        return median(self.block_ms) / self.steps


@dataclass(frozen=True)
class Difference:
    """||engine - other|| / ||other||, in float64.

    Attributes:
        other: OWN or UNROUNDED.
        velocities: of the first block's steps; the first has the same noise on both sides.
        latents: of each block. Blocks build on what came before, so differences add up.
    """

    other: str
    velocities: tuple[float, ...]
    latents: tuple[float, ...]


@dataclass(frozen=True)
class CompareResult:
    """Both sides on the same weights and inputs.

    Attributes:
        settings: of the engine.
        version: of the reference.
        reference, engine: the sides.
        differences: against the reference as it is, and in float32 also without its roundings.
        notes: what a reader must know, in sentences.
        seconds: that the comparison took.
    """

    settings: Settings
    version: str
    reference: Side
    engine: Side
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def ratio(self) -> float:
        """The reference's time for a step over the engine's, each its share of a block."""
        return self.reference.step_share / self.engine.step_share

    @property
    def problems(self) -> tuple[str, ...]:
        """Differences beyond what the precisions explain: then the ratio compares two computations."""
        worst = {one.other: max(one.latents) for one in self.differences}
        coarser = _coarser(self.reference.precision, self.engine.precision)
        limits = {OWN: _LIMITS[coarser], UNROUNDED: _UNROUNDED_LIMIT if coarser == "fp32" else _LIMITS[coarser]}
        return tuple(
            f"latents differ by {found:.1e} from the {other}, more than {limits[other]:g}: another computation"
            for other, found in worst.items()
            if not found <= limits[other]
        )

    @property
    def warm_up(self) -> str:
        return f"{self.settings.warm_up} blocks of each side, compilation and captured graphs included"

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {**asdict(self), "ratio": self.ratio}

    def as_run(self) -> Run:
        """The comparison among other suites."""
        sides = (("reference", self.reference), ("engine", self.engine))
        return Run(
            SUITE,
            self.settings.as_dict(),
            seconds=self.seconds,
            warm_up=self.warm_up,
            figures=(
                *(figure for key, side in sides for figure in _figures(key, side)),
                Figure("step_ratio", self.ratio, "", "reference over engine, a step as its share of a block"),
                Figure(
                    "step_p50_ratio",
                    self.reference.step_p50 / self.engine.step_p50,
                    "",
                    "reference over engine, median step",
                ),
                *(figure for one in self.differences for figure in _difference_figures(one)),
            ),
            series=(
                *(Series(f"{key}_step_ms", "ms", f"the {key}: a step", side.measured.step_ms) for key, side in sides),
                *(Series(f"{key}_block_ms", "ms", f"the {key}: a block", side.block_ms) for key, side in sides),
                *(Series(f"latents_from_{_key(one)}", "", _told(one), one.latents) for one in self.differences),
            ),
            rows=tuple(asdict(one) for one in self.reference.measured.stand_ins),
            notes=(
                f"the reference: {self.reference.precision}, {self.reference.mode}; {self.version}",
                f"the engine: {self.engine.precision}, {self.engine.mode}",
                *self.notes,
            ),
            problems=self.problems,
        )


def stand_in_table(run: Run) -> Table:
    """What stood in for what, of a run that `CompareResult.as_run` made."""
    table = Table(title="what stood in, in the reference", title_justify="left")
    for heading in ("for", "came", "because"):
        table.add_column(heading)
    for row in run.rows:
        table.add_row(*(Text(row[field]) for field in ("name", "instead", "reason")))
    return table


def notes_of(precisions: tuple[str, str], differences: tuple[Difference, ...]) -> tuple[str, ...]:
    """What limits the agreement, and what a step holds on either side, in the precisions of the two."""
    return (
        _limit(precisions, differences),
        f"in every step of the reference: {'; '.join(IN_EACH_STEP)}",
        f"in the engine: {'; '.join(AT_OTHER_TIMES)}",
        f"both: one actor, no pose, sink distance {SINK_DISTANCE}, the reference image replaced after {UPDATE_AFTER} "
        "blocks; Euler steps in float32, which the reference rounds to its dtype",
    )


def _limit(precisions: tuple[str, str], differences: tuple[Difference, ...]) -> str:
    told = {
        "fp8": "e4m3, one scale per tensor in the reference, one per token and output channel in the engine",
        "bf16": "bf16, one unit of which is 3.9e-3; the two round in different places",
        "fp32": "the reference's own roundings, bf16 in front of norm3 above all and a float16 table of rotary angles",
    }
    coarser = _coarser(*precisions)
    unrounded = [max(one.latents) for one in differences if one.other == UNROUNDED and coarser == "fp32"]
    without = f"; without them {unrounded[0]:.1e} remains" if unrounded else ""
    return f"what limits the agreement: {told[coarser]}{without}"


def _coarser(*precisions: str) -> str:
    return next(name for name in _LIMITS if name in precisions)


def _figures(key: str, side: Side) -> tuple[Figure, ...]:
    peak = side.measured.peak_bytes
    return (
        Figure(f"{key}_step_ms_p50", side.step_p50, "ms", f"the {key}: a step, median"),
        Figure(f"{key}_step_ms_p99", side.step_p99, "ms", f"the {key}: a step, p99"),
        Figure(f"{key}_step_ms", side.step_share, "ms", f"the {key}: a step, its share of a median block"),
        Figure(f"{key}_memory_mb", None if peak is None else peak / 2**20, "MiB", f"the {key}: peak memory"),
    )


def _difference_figures(one: Difference) -> tuple[Figure, ...]:
    key, told = _key(one), _told(one)
    return (
        Figure(f"velocity_from_{key}", one.velocities[0], "", f"{told}: velocity of the first step"),
        Figure(f"latents_from_{key}_worst", max(one.latents), "", f"{told}: latents, largest block"),
    )


def _key(one: Difference) -> str:
    return "reference" if one.other == OWN else "unrounded_reference"


def _told(one: Difference) -> str:
    return f"relative L2 from the {one.other}"
