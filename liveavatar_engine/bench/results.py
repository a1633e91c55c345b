"""What a suite returns, and the JSON document that holds it. docs/tuning.md describes the document for users."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .environment import Environment
from .kernels.rows import Limits
from .kernels.timing import Ceilings

SCHEMA, VERSION = "liveavatar_engine.bench", 1
MEASURED, SIMULATED, NOT_RUN, FAILED = "measured", "simulated", "not run", "failed"
"""What became of a run; only a MEASURED or SIMULATED one has figures, and those of the latter are predictions."""


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        name: unique in its run; never changes its meaning within a version of the schema.
        value: None where it does not exist on this device.
        unit: such as "ms"; "share" for what is shown in percent; "" for counts and ratios.
        label: what it is, for people.
    """

    name: str
    value: float | None
    unit: str
    label: str


@dataclass(frozen=True)
class Series:
    """Values in the order in which they were measured, raw.

    Attributes:
        deadline: a value that none should exceed, or None.
    """

    name: str
    unit: str
    label: str
    values: tuple[float, ...]
    deadline: float | None = None

    @property
    def p50(self) -> float:
        """The median."""
        return percentile(self.values, 50)

    @property
    def p99(self) -> float:
        return percentile(self.values, 99)

    @property
    def misses(self) -> int:
        """Values beyond the deadline."""
        return 0 if self.deadline is None else sum(value > self.deadline for value in self.values)


@dataclass(frozen=True)
class Stage:
    """A part of a step, or of what is done once per block.

    Attributes:
        ms: device time per step (per block where `per_block`).
        flops, bytes: that it needs at least; None where they are not modelled.
        tflops, gbps: these over the time.
        datasheet, measured: the time that the datasheet's limits, or the ceilings measured in the same run, would
            allow, over `ms`: 1 is the limit.
    """

    name: str
    ms: float
    calls: float
    per_block: bool = False
    flops: float | None = None
    bytes: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    datasheet: float | None = None
    measured: float | None = None


@dataclass(frozen=True)
class Run:
    """A suite at one point of a sweep.

    Attributes:
        suite: its name.
        settings: of the point, as they were asked for and as they came out.
        status: one of those above; `reason` says why it has no figures.
        seconds: that the run took.
        warm_up: what was left out of the figures.
        figures, series, stages: as above.
        rows: of a table that only this suite has, one dictionary each.
        notes: what a reader must know, in sentences.
        problems: what makes the command fail though something was measured, in sentences.
    """

    suite: str
    settings: dict[str, Any]
    status: str = MEASURED
    reason: str | None = None
    seconds: float = 0.0
    warm_up: str = ""
    figures: tuple[Figure, ...] = ()
    series: tuple[Series, ...] = ()
    stages: tuple[Stage, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def has_figures(self) -> bool:
        """Whether something came of it."""
        return self.status in (MEASURED, SIMULATED)

    def figure(self, name: str) -> float | None:
        """The value of a figure; None where it has none."""
        return next((figure.value for figure in self.figures if figure.name == name), None)


@dataclass(frozen=True)
class Report:
    """Everything that a command measured.

    Attributes:
        ceilings: what the device really does, measured in the same run; None where no suite needed it.
        limits: of its datasheet; None for a device that is not known, such as a CPU.
        complete: False in the document of a command that is still going on, or was interrupted.
    """

    environment: Environment
    ceilings: Ceilings | None
    limits: Limits | None
    runs: tuple[Run, ...] = field(default=())
    complete: bool = True

    @property
    def measured(self) -> bool:
        """Whether anything stands in it that a device has done."""
        return any(run.status != SIMULATED for run in self.runs)

    def as_json(self) -> str:
        """The document, `schema.validate` has no complaint about it."""
        document = {
            "schema": SCHEMA,
            "version": VERSION,
            "complete": self.complete,
            "environment": self.environment.as_dict(),
            "ceilings": None if self.ceilings is None else self.ceilings._asdict(),
            "limits": None if self.limits is None else self.limits._asdict(),
            "runs": [_run_as_dict(run) for run in self.runs],
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` percent of `values` lie, linearly between two neighbours; NaN of nothing."""
    return float(np.percentile(values, share)) if len(values) else float("nan")


def _run_as_dict(run: Run) -> dict[str, Any]:
    return {
        **asdict(run),
        "figures": {f.name: {"value": f.value, "unit": f.unit, "label": f.label} for f in run.figures},
        "series": {
            s.name: {
                "unit": s.unit,
                "label": s.label,
                "deadline": s.deadline,
                "p50": s.p50 if s.values else None,
                "p99": s.p99 if s.values else None,
                "values": list(s.values),
            }
            for s in run.series
        },
    }
