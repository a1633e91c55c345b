"""The targets that the kernels were written for, and what the rows say about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from liveavatar_kernels.model_sizes import ModelSizes

from . import subjects
from .rows import Row, fastest
from .subjects import Subject

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class Target:
    """A number that every case of a subject must reach.

    Attributes:
        key: for figures.
        name: in words.
        subject: whose fastest own implementation counts.
        number: of a row; None where it was not measured.
        least: what it must be.
        counts: which of the subject's cases count.
    """

    key: str
    name: str
    subject: Subject
    number: Callable[[Row], float | None]
    least: float
    counts: Callable[[Any], bool] = lambda case: True


@dataclass(frozen=True)
class Verdict:
    """What became of a target.

    Attributes:
        key, target: the target's key and name.
        verdict: one of those above.
        numbers: by case, as far as they were measured.
        missing: cases that were not.
    """

    key: str
    target: str
    least: float
    verdict: str
    numbers: dict[str, float]
    missing: tuple[str, ...]


def _ratio(row: Row) -> float | None:
    return row.ratio


def _copy_share(row: Row) -> float | None:
    return row.copy_share


TARGETS = (
    Target(
        "attention_bf16_ratio",
        "attention in bf16 over the best library with its rotation pass",
        subjects.RING_ATTENTION,
        _ratio,
        1.0,
        lambda case: not case.quantized,
    ),
    Target(
        "attention_e4m3_ratio",
        "attention in e4m3 over the best bf16 library with its rotation pass",
        subjects.RING_ATTENTION,
        _ratio,
        1.4,
        lambda case: case.quantized,
    ),
    Target(
        "linear_e4m3_ratio", "FP8 GEMM with the quantise pass over cuBLASLt rowwise with it", subjects.PAIR, _ratio, 1.0
    ),
    Target("norm_copy_share", "norms: share of the bandwidth of a copy", subjects.MODULATED_NORM, _copy_share, 0.8),
    Target(
        "ring_write_copy_share",
        "ring write: share of the bandwidth of a copy",
        subjects.RING_WRITE,
        _copy_share,
        0.8,
        lambda case: not case.normalised,
    ),
    Target(
        "vae_norm_copy_share", "VAE norm: share of the bandwidth of a copy", subjects.CHANNEL_NORM, _copy_share, 0.8
    ),
)
"""Of issue 3. "Memory bandwidth" is what a large copy reaches on the machine; rows give the datasheet's share too."""


def judge(rows: Sequence[Row], sizes: ModelSizes, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Missed as soon as one case misses; met when every case of the model was measured."""
    found = []
    for target in targets:
        names = [case.name for case in target.subject.model_cases(sizes) if target.counts(case)]
        best = {row.case: target.number(row) for row in fastest(rows, target.subject.name)}
        numbers = {name: number for name in names if (number := best.get(name)) is not None}
        missing = tuple(name for name in names if name not in numbers)
        if any(number < target.least for number in numbers.values()):
            verdict = MISSED
        else:
            verdict = NOT_MEASURED if missing else MET
        found.append(Verdict(target.key, target.name, target.least, verdict, numbers, missing))
    return found
