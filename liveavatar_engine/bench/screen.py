"""The report as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from liveavatar_kernels.model_sizes import WAN_14B
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from . import ablation, step
from .compare import report as compare
from .kernels import report as kernel_tables
from .kernels import suite as kernels
from .kernels import targets
from .labels import labels
from .results import FAILED, SIMULATED, Figure, Report, Run, Stage
from .tpp import suite as tpp
from .tpp.options import SUITE as TPP
from .tpp.picture import text_timeline

_WIDTH = 180
"""Columns where the report does not go to a terminal."""
STAGE_HEADINGS = ("stage", "ms", "share of step", "calls", "TFLOP/s", "GB/s", "of datasheet", "of measured")
CPU_NOTE = "Measured on a CPU: this says nothing about a GPU, nor about the performance of kernels."


def show(report: Report) -> None:
    """Print everything to the terminal's output."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    for part in parts(report):
        console.print(part, soft_wrap=not isinstance(part, Table))


def parts(report: Report) -> Iterator[RenderableType]:
    """What is printed, from top to bottom."""
    for suite in dict.fromkeys(run.suite for run in report.runs):
        runs = [run for run in report.runs if run.suite == suite]
        names = labels(runs)
        found = [(name, run) for name, run in zip(names, runs, strict=True) if run.has_figures]
        if found and suite != ablation.SUITE:
            yield _figures(suite, [name for name, _ in found], [run for _, run in found])
        for name, run in found:
            yield from _details(f"{suite}, {name}", run)
        for name, run in zip(names, runs, strict=True):
            yield from _remarks(suite, name, run)
    environment = report.environment
    if environment.device_kind == "cpu" and report.measured:
        yield Text(CPU_NOTE, style="yellow")
    commit = environment.commit + (" with changes" if environment.dirty else "")
    yield Text(f"{environment.label}\ncommit {commit}; {environment.date}; {environment.command}", style="dim")


def _figures(suite: str, names: Sequence[str], runs: Sequence[Run]) -> Table:
    """A line per figure, a column per point."""
    table = Table(title=suite, title_justify="left", title_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right")
    table.add_column("")
    by_name = {figure.name: figure for run in runs for figure in run.figures}
    for name, figure in by_name.items():
        found = [next((one for one in run.figures if one.name == name), None) for run in runs]
        table.add_row(Text(figure.label), *(number(one) for one in found), "" if _bare(figure) else figure.unit)
    return table


def number(figure: Figure | None) -> str:
    """A figure's value without its unit; a dash where there is none."""
    if figure is None or figure.value is None:
        return "-"
    if figure.unit == "share":
        return f"{figure.value:.1%}"
    whole = abs(figure.value) >= 1000 or figure.value == int(figure.value)
    return f"{figure.value:,.0f}" if whole else f"{figure.value:.4g}"


def _bare(figure: Figure) -> bool:
    return figure.unit in ("", "share")


def _details(name: str, run: Run) -> Iterator[RenderableType]:
    """Tables that only some suites have."""
    if run.suite == kernels.SUITE:
        rows = kernels.rows_of(run)
        yield kernel_tables.table(rows)
        yield kernel_tables.not_run(rows)
        yield kernel_tables.target_table(targets.judge(rows, WAN_14B))
        return
    if run.suite == step.SUITE:
        yield _stages(name, run.stages)
    if run.suite == compare.SUITE and run.rows:
        yield compare.stand_in_table(run)
    if run.suite == TPP:
        if tpp.draws_a_timeline(run):
            yield from text_timeline(run)
        yield from (tpp.table(*parts) for parts in tpp.tables(run))
    if run.suite == ablation.SUITE:
        yield _ablation(name, run.rows)
        yield from (Text(f"  {row['name']}: {row['reason']}", style="yellow") for row in run.rows if row["reason"])


def stage_lines(stages: Sequence[Stage]) -> Iterator[tuple[str, ...]]:
    """The cells of each stage under STAGE_HEADINGS."""
    whole = sum(stage.ms for stage in stages if not stage.per_block)
    for stage in stages:
        yield (
            stage.name,
            f"{stage.ms:.3f}",
            "per block" if stage.per_block else f"{stage.ms / whole:.1%}",
            f"{stage.calls:.4g}",
            maybe(stage.tflops, "{:,.4g}"),
            maybe(stage.gbps, "{:,.4g}"),
            maybe(stage.datasheet, "{:.1%}"),
            maybe(stage.measured, "{:.1%}"),
        )


def _stages(name: str, stages: Sequence[Stage]) -> Table:
    first, *others = STAGE_HEADINGS
    table = Table(first, title=f"{name}: where the time goes", title_justify="left")
    table.caption = "of datasheet, of measured: the time that the limit would allow over the time taken"
    for heading in others:
        table.add_column(heading, justify="right")
    for line in stage_lines(stages):
        table.add_row(*line)
    return table


def _ablation(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("variant", title=f"{name}: the paper's Tables 3 and 6", title_justify="left")
    columns = ("devices", "evaluations", "fps", "ttff (s)", "memory (MiB)", "paper: fps", "ttff (s)", "T.Flicker")
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        published = row["paper"] or {}
        head = (Text(row["name"]), str(row["devices"]), str(row["evaluations"]))
        paper = (
            _two(published.get("fps"), published.get("optimised_fps")),
            _two(published.get("ttff"), published.get("optimised_ttff")),
            maybe(published.get("flicker"), "{:.3f}"),
        )
        ours = (maybe(row["fps"], "{:.2f}"), maybe(row["ttff_s"], "{:.2f}"), maybe(row["memory_mb"], "{:,.0f}"))
        table.add_row(*head, *ours, *paper)
    table.caption = "the paper: without its kernel optimisations (with them)"
    return table


def _remarks(suite: str, name: str, run: Run) -> Iterator[Text]:
    if not run.has_figures:
        style = "red" if run.status == FAILED else "yellow"
        yield Text(f"{suite}, {name}: {run.status}: {run.reason}", style=style)
        return
    told = "simulated, nothing was measured" if run.status == SIMULATED else f"left out: {run.warm_up}"
    yield Text(f"{suite}, {name}: {told}; {run.seconds:.1f} s", style="dim")
    for note in run.notes:
        yield Text(f"  {note}", style="dim")
    for problem in run.problems:
        yield Text(f"  {problem}", style="red")


def maybe(value: float | None, pattern: str) -> str:
    """A value by a pattern, nothing for None."""
    return "" if value is None else pattern.format(value)


def _two(plain: float | None, optimised: float | None) -> str:
    if plain is None:
        return ""
    return f"{plain:.2f}" if optimised is None else f"{plain:.2f} ({optimised:.2f})"
