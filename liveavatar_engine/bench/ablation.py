"""The suite `ablation`: the paper's Tables 3 and 6 for this machine, each row a short stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..errors import LiveAvatarError
from . import paper
from .bench import Bench
from .results import Figure, Run
from .settings import Settings
from .stream import run_session

SUITE = "ablation"


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        key: for figures.
        name: in words.
        devices: that it takes.
        changes: to the engine's settings.
        published: what the paper says of it.
    """

    key: str
    name: str
    devices: int = 1
    changes: Mapping[str, Any] = field(default_factory=dict)
    published: paper.Published | None = None


def _gpus(count: int) -> list[str]:
    return [f"cuda:{number}" for number in range(count)]


VARIANTS = (
    Variant("sequential", "sequential", published=paper.TIMESTEP_FORCING),
    Variant("clean", "sequential, clean cache", changes={"kv_mode": "clean"}, published=paper.CLEAN_CACHE),
    Variant("diagonal", "diagonal schedule", changes={"schedule": "diagonal"}),
    Variant(
        "sequence_parallel",
        "sequence parallel, clean cache",
        4,
        {"devices": _gpus(4), "sequence_parallel": 4, "kv_mode": "clean"},
        paper.SEQUENCE_PARALLEL,
    ),
    Variant("tpp_4", "TPP, no VAE device of its own", 4, {"devices": _gpus(4)}, paper.TPP_WITHOUT_VAE_DEVICE),
    Variant("tpp_5", "TPP", 5, {"devices": _gpus(5)}, paper.TPP),
)
_PLAIN: Mapping[str, Any] = {"schedule": "sequential", "kv_mode": "timestep"}


def measure(settings: Settings, bench: Bench) -> Run:
    """Run every variant that this version and machine have; others become rows that say why not."""
    rows = [_row(variant, settings, bench) for variant in VARIANTS]
    figures = [
        Figure(f"{row['key']}_{name}", row[name], unit, f"{row['name']}: {label}")
        for row in rows
        for name, unit, label in (
            ("fps", "frames/s", "whole pipeline, from opening the session"),
            ("ttff_s", "s", "time to first frame"),
            ("memory_mb", "MiB", "memory"),
        )
        if row["reason"] is None
    ]
    return Run(
        SUITE,
        {**settings.as_dict(), **_PLAIN},
        warm_up=f"of each row: Engine.warm_up and {settings.warm_up + 1} blocks",
        figures=tuple(figures),
        rows=tuple(rows),
        notes=(f"the paper's columns: {paper.SOURCE}; its quality figures are quoted, not measured here",),
    )


def _row(variant: Variant, settings: Settings, bench: Bench) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": variant.key,
        "name": variant.name,
        "devices": variant.devices,
        "evaluations": settings.steps + ("kv_mode" in variant.changes),
        "fps": None,
        "steady_fps": None,
        "ttff_s": None,
        "memory_mb": None,
        "reason": None,
        "paper": None if variant.published is None else asdict(variant.published),
    }
    try:
        bench.restart_memory()
        with bench.engine(settings, **{**_PLAIN, **variant.changes}) as engine:
            found = run_session(engine, settings, bench)
    except (LiveAvatarError, torch.OutOfMemoryError) as error:
        reason = f"not available: {str(error).splitlines()[0]}"
        bench.say(f"{variant.name}: {reason}")
        return {**row, "reason": reason}
    measured = {
        "fps": found.fps,
        "steady_fps": found.steady_fps,
        "ttff_s": found.ttff,
        "memory_mb": found.memory / 2**20 if variant.devices == 1 else None,
    }
    bench.say(f"{variant.name}: {found.fps:.2f} frames/s, {found.ttff:.2f} s to the first frame")
    return {**row, **measured}
