"""What one side of a comparison is asked to do, and what it found; both travel between processes as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..settings import Settings
from .stand_ins import StandIn

REFERENCE, ENGINE = "reference", "engine"
"""The two sides."""
UPDATE_AFTER = 4
"""Blocks after which the first generated latent frame becomes the reference image, as in the reference's pipelines."""
SINK_DISTANCE = 12
"""In latent frames; the reference draws one anew in every call, a comparison needs a fixed one."""


@dataclass(frozen=True)
class Job:
    """One side's work: some blocks of a stream.

    Attributes:
        side: REFERENCE or ENGINE.
        settings: of the engine; the reference takes model, weights, size, steps, blocks and seed from them.
        reference_precision: "fp32", "bf16" or "fp8", of the reference.
        checkout: root of the reference.
        compiled: torch.compile in the reference, as its scripts use it.
        threads: of torch, on a CPU.
    """

    side: str
    settings: Settings
    reference_precision: str
    checkout: Path
    compiled: bool
    threads: int

    @property
    def blocks(self) -> int:
        """All blocks, the warm-up included."""
        return self.settings.warm_up + self.settings.blocks

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Job:
        entries: dict[str, Any] = json.loads(text)
        settings, checkout = Settings(**entries.pop("settings")), Path(entries.pop("checkout"))
        return cls(settings=settings, checkout=checkout, **entries)


@dataclass(frozen=True)
class Measured:
    """What one side took, and what stood in for what.

    Attributes:
        step_ms: of every step after the warm-up, block by block. What is done once per block counts to its first step.
        peak_bytes: of device memory that was allocated at once; None on a CPU.
        stand_ins: that were used.
    """

    step_ms: tuple[float, ...]
    peak_bytes: int | None
    stand_ins: tuple[StandIn, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Measured:
        entries: dict[str, Any] = json.loads(text)
        stand_ins = tuple(StandIn(**entry) for entry in entries["stand_ins"])
        return cls(tuple(entries["step_ms"]), entries["peak_bytes"], stand_ins)
