"""Check every implementation of a case, and time those that are right."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from liveavatar_kernels import KernelUnavailableError

from .checks import Arguments, Judge, duplicate, poisoned_memory
from .rows import ABSENT, FAILED, MEASURED, REFUSED, SKIPPED, TRUTHS, UNCHECKED, WRONG, Limits, Row, timed
from .subjects import Candidate, Subject
from .timing import Ceilings, Clock, Launcher, first_line, launcher, measure, sets_beyond_cache


@dataclass(frozen=True)
class Conditions:
    """Under which cases are measured.

    Attributes:
        repeats: least number of timed runs.
        cache_bytes: of the L2 cache.
        implementations: those to look at, empty for all.
    """

    device: torch.device
    clock: Clock
    repeats: int
    cache_bytes: int
    limits: Limits | None = None
    ceilings: Ceilings | None = None
    implementations: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0


def run_case(subject: Subject, case: Any, conditions: Conditions) -> list[Row]:
    """Rows of a case, without ratios."""
    blank = Row(
        subject.name,
        case.name,
        "",
        subject.dtype(case),
        SKIPPED,
        rivals=subject.rivals(case),
        flops=subject.flops(case),
        bytes=subject.bytes(case),
    )
    candidates = subject.candidates(case, conditions.device)
    rows = {
        one.implementation: replace(blank, implementation=one.implementation, library=one.library) for one in candidates
    }
    todo = []
    for one in candidates:
        status, reason = _left_out(one, case, subject, conditions.implementations)
        if status is None:
            todo.append(one)
        else:
            rows[one.implementation] = replace(rows[one.implementation], status=status, reason=reason)
    if todo:
        _fill(rows, todo, subject, case, conditions)
    return list(rows.values())


def _left_out(
    one: Candidate, case: Any, subject: Subject, implementations: Sequence[str]
) -> tuple[str | None, str | None]:
    """Status and reason of what is not even tried."""
    if implementations and one.implementation.split(",")[0] not in implementations:
        return SKIPPED, "not among --implementations"
    if one.absent is not None:
        return ABSENT, one.absent
    if not implementations and one.implementation in TRUTHS:
        return SKIPPED, "what others are compared with; --implementations times it"
    if one.library and subject.rivals(case) != case.name:
        return SKIPPED, f"would dequantise the caches first; it is measured as {subject.rivals(case)!r}"
    return None, None


def _fill(rows: dict[str, Row], todo: Sequence[Candidate], subject: Subject, case: Any, conditions: Conditions) -> None:
    """Check and time in place; whatever raises becomes a row."""
    sets = sets_beyond_cache(subject.bytes(case), conditions.cache_bytes)
    launchers: dict[str, Launcher] = {}
    try:
        arguments = subject.arguments(case, conditions.dtype, conditions.device, conditions.seed)
        judge = subject.judge(case, arguments)
    except Exception as error:
        for one in todo:
            reason = f"the reference or the yardstick failed: {first_line(error)}"
            rows[one.implementation] = replace(rows[one.implementation], status=UNCHECKED, reason=reason)
        return
    for one in todo:
        name = one.implementation
        rows[name] = _checked(rows[name], one, arguments, judge)
        if rows[name].status != MEASURED:
            continue
        try:
            launchers[name] = launcher(_calls(one, arguments, sets), conditions.clock)
        except Exception as error:
            rows[name] = replace(rows[name], status=FAILED, reason=first_line(error))
    del judge
    try:
        summaries = measure(list(launchers.values()), conditions.repeats, conditions.clock)
    except Exception as error:
        for name in launchers:
            rows[name] = replace(rows[name], status=FAILED, reason=f"while it was timed: {first_line(error)}")
        return
    finally:
        gc.collect()
    for (name, one_launcher), summary in zip(launchers.items(), summaries, strict=True):
        row = replace(rows[name], how=one_launcher.how, note=one_launcher.why, sets=sets)
        rows[name] = timed(row, summary, conditions.limits, conditions.ceilings)


def _checked(row: Row, one: Candidate, arguments: Arguments, judge: Judge) -> Row:
    """The row with what the checks say: MEASURED, which it is to become, only for a right result."""
    try:
        with poisoned_memory():
            outputs = one.run(one.prepare(duplicate(arguments)))
        findings = judge(one.implementation, outputs)
    except KernelUnavailableError as error:
        return replace(row, status=REFUSED, reason=str(error))
    except Exception as error:
        return replace(row, status=FAILED, reason=first_line(error))
    wrong = [str(finding) for finding in findings if not finding.passes]
    if wrong:
        return replace(row, status=WRONG, reason="; ".join(wrong), checks=tuple(map(str, findings)))
    return replace(row, status=MEASURED, checks=tuple(map(str, findings)))


def _calls(one: Candidate, arguments: Arguments, sets: int) -> list[Callable[[], object]]:
    """A call for each of some sets of inputs."""
    return [partial(one.run, one.prepare(duplicate(arguments))) for _ in range(sets)]
