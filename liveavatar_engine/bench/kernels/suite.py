"""Kernels at the 14B model's sizes on this machine's GPU: first whether they are right, then how fast they are.

Times are of calls in CUDA graphs, over random inputs that do not fit in the cache. What computes something wrong gets
no time. Nothing is measured without a CUDA device: neither a CPU nor Triton's interpreter says anything about a
kernel's speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from liveavatar_kernels.model_sizes import WAN_14B

from ...errors import ConfigError
from ...files import write_atomically
from ..bench import Bench
from ..results import Figure, Run
from . import choose, report, targets
from .rows import Row, failures, with_ratios
from .runner import Conditions, run_case
from .subjects import SUBJECTS, Subject
from .timing import cache_bytes

SUITE = "kernels"
NO_DEVICE = (
    "kernels: needs a CUDA device (sm_80 or newer) and a torch that sees it; times of a CPU or of Triton's "
    "interpreter are never reported as performance"
)
OP_NAMES = tuple(sorted({subject.op.name for subject in SUBJECTS}))
IMPLEMENTATION_NAMES = tuple(sorted({one.name for subject in SUBJECTS for one in subject.op.implementations}))
_REPEATS, _QUICK_REPEATS = 50, 20


@dataclass(frozen=True)
class KernelOptions:
    """What to look at.

    Attributes:
        ops: names of ops, empty for all.
        text: only cases whose op and name contain it.
        implementations: only these, empty for all.
        quick: the larger picture size alone, fewer repeats.
        choose: write what was fastest to fp8_linear/choices.json.
        seed: of the inputs.

    Raises:
        ConfigError: there is no such op or implementation, or `choose` goes with `quick`.
    """

    ops: tuple[str, ...] = ()
    text: str = ""
    implementations: tuple[str, ...] = ()
    quick: bool = False
    choose: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for what, names, known in (
            ("op", self.ops, OP_NAMES),
            ("implementation", self.implementations, IMPLEMENTATION_NAMES),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ConfigError(f"no {what} {unknown[0]!r}; there are {', '.join(known)}")
        if self.choose and self.quick:
            raise ConfigError("--choose needs every picture size: leave out --quick")


def measure(options: KernelOptions, bench: Bench, progress: Callable[[Run], None]) -> Run:
    """Check and time all cases that `options` select; `progress` gets the run so far after each of them.

    Raises:
        ConfigError: there is no CUDA device, or no such case.
    """
    if bench.device.type != "cuda":
        raise ConfigError(NO_DEVICE)
    cases = selected(options.ops, options.text, options.quick)
    if not cases:
        raise ConfigError(f"kernels: no case has {options.text!r} in its name")
    repeats = _QUICK_REPEATS if options.quick else _REPEATS
    conditions = Conditions(
        bench.device,
        bench.clock,
        repeats,
        cache_bytes(bench.device),
        bench.limits,
        bench.ceilings,
        options.implementations,
        seed=options.seed,
    )
    run = Run(SUITE, _settings(options), warm_up=f"20 ms of each call, then {repeats} runs in turns")
    rows: list[Row] = []
    started = time.perf_counter()
    for number, (subject, case) in enumerate(cases, start=1):
        with _exact_float32():
            found = run_case(subject, case, conditions)
        rows = with_ratios([*rows, *found])
        torch.cuda.empty_cache()
        seconds = time.perf_counter() - started
        run = _filled(run, rows, f"{number} of {len(cases)} cases", seconds)
        progress(run)  # now, for the machine may be gone before the last case
        bench.say(f"[{number}/{len(cases)}, {seconds:.0f} s] {report.line(subject.name, case.name, found)}")
    return _chosen(run, rows, bench) if options.choose else run


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Float32 products are float32, so that truths are true."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def rows_of(run: Run) -> list[Row]:
    """The rows of a run, for the tables of `report`."""
    return [Row(**{**row, "checks": tuple(row["checks"])}) for row in run.rows]


def selected(ops: Sequence[str], text: str, quick: bool) -> list[tuple[Subject, Any]]:
    """Subjects of the ops named (all if none is) and their cases at the model's sizes that `text` occurs in."""
    found = []
    largest = max(WAN_14B.block_tokens)
    for subject in SUBJECTS:
        if ops and not {subject.name, subject.op.name} & set(ops):
            continue
        cases = subject.model_cases(WAN_14B)
        if quick:
            cases = _of_largest(cases, largest)
        found += [(subject, case) for case in cases if text.lower() in f"{subject.name}, {case.name}".lower()]
    return found


def _of_largest(cases: Sequence[Any], tokens: int) -> tuple[Any, ...]:
    """Those of the larger picture size; cases without tokens come in equal numbers per size, the larger one last."""
    if hasattr(cases[0], "tokens"):
        return tuple(case for case in cases if case.tokens == tokens)
    return tuple(cases[-len(cases) // len(WAN_14B.block_tokens) :])


def _settings(options: KernelOptions) -> dict[str, Any]:
    return {
        "sizes": "14b",
        "ops": list(options.ops) or "all",
        "text": options.text,
        "implementations": list(options.implementations) or "all",
        "quick": options.quick,
        "seed": options.seed,
    }


def _filled(run: Run, rows: Sequence[Row], cases: str, seconds: float) -> Run:
    """The run with what the rows say."""
    verdicts = targets.judge(rows, WAN_14B)
    return replace(
        run,
        seconds=round(seconds, 1),
        settings={**run.settings, "cases": cases},
        rows=tuple(asdict(row) for row in rows),
        figures=tuple(
            Figure(one.key, min(one.numbers.values(), default=None), "", f"{one.target}, worst case")
            for one in verdicts
        ),
        notes=tuple(f"target {one.least:g}, {one.verdict}: {one.target}" for one in verdicts),
        problems=tuple(f"not right: {sentence}" for sentence in failures(rows)),
    )


def _chosen(run: Run, rows: Sequence[Row], bench: Bench) -> Run:
    """Write the choices that follow from the rows."""
    environment = bench.environment
    commit = environment.commit + ("-dirty" if environment.dirty else "")
    chosen = choose.choose(rows, WAN_14B, environment.device, commit, environment.command)
    try:
        write_atomically(choose.PATH, choose.updated(choose.PATH.read_text(encoding="utf-8"), chosen))
    except ValueError as error:
        return replace(run, problems=(*run.problems, f"nothing was chosen: {error}"))
    bench.say(f"{len(chosen)} choices written to {choose.PATH}")
    return run
