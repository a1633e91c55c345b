"""Runs suites at the points of a sweep; one that fails leaves the others alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import LiveAvatarError
from . import ablation, step, stream, vae
from .bench import Bench
from .compare import suite as compare
from .compare.report import SUITE as COMPARE
from .kernels import suite as kernels
from .kernels.timing import first_line
from .results import FAILED, NOT_RUN, Report, Run
from .settings import Settings
from .tpp import suite as tpp
from .tpp.options import SUITE as TPP
from .tpp.options import TppOptions

Measure = Callable[[Settings, Bench], Run]
Save = Callable[[Report], None]
"""Called with what there is so far."""

_BY_POINT: dict[str, Measure] = {module.SUITE: module.measure for module in (step, vae, stream, ablation)}
SUITES = (kernels.SUITE, *_BY_POINT)
"""Those that "all" runs, in this order."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        suites: of SUITES, or that of comparing with the reference, or that of pipelines.
        points: of the sweep, one or more; the suite `kernels` has none, `tpp` one.
        kernel_options, compare_options, tpp_options: of these suites.
        isolated: whether a suite that cannot run, or fails, becomes a run that says so; otherwise it raises.
    """

    suites: tuple[str, ...]
    points: tuple[Settings, ...]
    kernel_options: kernels.KernelOptions
    compare_options: compare.CompareOptions | None
    isolated: bool
    tpp_options: TppOptions | None = None

    @property
    def runs(self) -> int:
        return sum(1 if suite in (kernels.SUITE, TPP) else len(self.points) for suite in self.suites)


def run_plan(plan: Plan, bench: Bench, save: Save) -> Report:
    """Run everything, saving after each run, and within the suite `kernels` after each case.

    Raises:
        LiveAvatarError: the only run cannot be made, unless the plan is isolated.
    """
    report = Report(bench.environment, None, bench.limits, complete=False)

    def with_run(*runs: Run) -> Report:
        return replace(report, runs=(*report.runs, *runs), ceilings=bench.measured_ceilings)

    for number, (name, settings, measure) in enumerate(_jobs(plan, bench, lambda run: save(with_run(run))), start=1):
        bench.say(f"{name}, {number} of {plan.runs}")
        started = time.perf_counter()
        run = _isolated(name, settings, measure) if plan.isolated else measure()
        bench.free()
        report = with_run(replace(run, seconds=round(time.perf_counter() - started, 2)))
        save(report)
    report = replace(report, complete=True)
    save(report)
    return report


def exit_code(report: Report) -> int:
    """0, or 1 where a run failed or found something wrong."""
    return 1 if any(run.status == FAILED or run.problems for run in report.runs) else 0


def _jobs(
    plan: Plan, bench: Bench, progress: Callable[[Run], None]
) -> Iterator[tuple[str, dict[str, Any], Callable[[], Run]]]:
    """Suite, settings and function of every run; points in the outer loop, so that weights are made once for each."""
    if kernels.SUITE in plan.suites:
        yield kernels.SUITE, {}, lambda: kernels.measure(plan.kernel_options, bench, progress)
    if plan.tpp_options is not None:
        yield TPP, plan.tpp_options.as_dict(), partial(tpp.measure, plan.tpp_options, plan.points[0], bench)
    for point in plan.points:
        for name in plan.suites:
            if name in _BY_POINT:
                yield name, point.as_dict(), partial(_BY_POINT[name], point, bench)
            elif name == COMPARE and plan.compare_options is not None:
                yield name, point.as_dict(), partial(compare.measure, plan.compare_options, point, bench)


def _isolated(suite: str, settings: dict[str, Any], measure: Callable[[], Run]) -> Run:
    """The run, or one that says why there is none. The suite `kernels` without a GPU is no failure."""
    try:
        return measure()
    except LiveAvatarError as error:
        status = NOT_RUN if str(error) == kernels.NO_DEVICE else FAILED
        return Run(suite, settings, status, reason=str(error))
    except Exception as error:  # whatever a suite runs into, the others are still worth having
        return Run(suite, settings, FAILED, reason=first_line(error))
