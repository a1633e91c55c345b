"""The report as one page: plots, tables and conditions; no script, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from . import ablation, plots, step, stream, vae, work
from .compare import report as compare
from .kernels import suite as kernels
from .kernels.rows import MEASURED as ROW_MEASURED
from .kernels.rows import fastest
from .labels import labels
from .plots import Bar, Segment
from .results import SIMULATED, Figure, Report, Run, Series, Stage
from .screen import CPU_NOTE, STAGE_HEADINGS, maybe, number, stage_lines
from .stages import ONCE_PER_BLOCK
from .style import STYLE
from .tpp import suite as tpp
from .tpp.options import SUITE as TPP
from .tpp.picture import CAPTION, timeline

_STYLES: Mapping[str, str] = {
    **{name: f"linear{index}" for index, name in enumerate(work.LINEARS)},
    work.RING_WRITE: "attention0",
    work.RING_ATTENTION: "attention1",
    work.TEXT_ATTENTION: "attention2",
    work.AUDIO_INJECTION: "audio0",
    ONCE_PER_BLOCK: "audio1",
    work.NORMS: "norm0",
    work.QUANTISE: "norm1",
    work.ENDS: "other0",
    work.EULER: "other1",
    work.REMAINDER: "other2",
}
"""Stage -> class of the style sheet: relatives have related colours."""
_HEADLINES: Mapping[str, tuple[str, ...]] = {
    step.SUITE: ("step_ms_p50", "step_tflops", "memory_mb"),
    vae.SUITE: ("decode_ms_p50",),
    stream.SUITE: ("steady_fps", "ttff_s", "block_ms_p99", "memory_mb"),
}
"""Figures that a sweep is drawn by."""
_REAL_STEP = "the step as streams run it, median"


def render(report: Report) -> str:
    """The page, well-formed as XML too."""
    body = "".join(_body(report))
    return (
        '<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>liveavatar-engine benchmark</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _body(report: Report) -> Iterator[str]:
    environment = report.environment
    yield f"<h1>liveavatar-engine on {escape(environment.device)}</h1>"
    if environment.device_kind == "cpu" and report.measured:
        yield f'<p class="warning">{escape(CPU_NOTE)}</p>'
    if not report.complete:
        yield '<p class="warning">Not finished: this holds what was measured until now.</p>'
    yield _conditions(report)
    for suite in dict.fromkeys(run.suite for run in report.runs):
        runs = [run for run in report.runs if run.suite == suite]
        yield f'<section id="{escape(suite)}"><h2>{escape(suite)}</h2>'
        yield from _suite(suite, runs)
        yield "</section>"


def _conditions(report: Report) -> str:
    environment, ceilings, limits = report.environment, report.ceilings, report.limits
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items() if version)
    rows = {
        "command": environment.command,
        "date": environment.date,
        "commit": environment.commit + (" (with changes)" if environment.dirty else ""),
        "versions": versions,
        "memory": f"{environment.memory_bytes / 2**30:,.1f} GiB",
    }
    if ceilings is not None:
        e4m3 = "" if ceilings.e4m3_tflops is None else f", e4m3 product {ceilings.e4m3_tflops:,.0f} TFLOP/s"
        rows["measured ceilings"] = (
            f"copy {ceilings.copy_gbps:,.4g} GB/s, {ceilings.dtype} product {ceilings.matmul_tflops:,.4g} TFLOP/s{e4m3}"
        )
    if limits is not None:
        rows["datasheet"] = (
            f"memory {limits.memory:,.0f} GB/s, bf16 {limits.bf16:,.0f} TFLOP/s, e4m3 {limits.e4m3:,.0f} TFLOP/s"
        )
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows.items())
    return f"<dl>{entries}</dl>"


def _suite(suite: str, runs: Sequence[Run]) -> Iterator[str]:
    names = labels(runs)
    found = {name: run for name, run in zip(names, runs, strict=True) if run.has_figures}
    if found and suite != ablation.SUITE:
        yield _figures(found)
    if len(found) > 1:
        yield from _sweep(found, _HEADLINES.get(suite, ()))
    if found and suite == step.SUITE:
        yield from _where_time_goes(found)
    for name, run in found.items():
        yield from _details(name, run)
    for name, run in zip(names, runs, strict=True):
        if not run.has_figures:
            yield f'<p class="warning">{escape(f"{name}: {run.status}: {run.reason}")}</p>'
            continue
        told = "simulated, nothing was measured" if run.status == SIMULATED else f"left out: {run.warm_up}"
        sentences = [told, *run.notes]
        notes = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
        problems = "".join(f'<li class="warning">{escape(problem)}</li>' for problem in run.problems)
        yield f'<h3>{escape(name)}: notes</h3><ul class="notes">{notes}{problems}</ul>'


def _figures(found: Mapping[str, Run]) -> str:
    """A line per figure, a column per point."""
    by_name: dict[str, Figure] = {figure.name: figure for run in found.values() for figure in run.figures}
    lines = []
    for name, figure in by_name.items():
        cells = [number(next((one for one in run.figures if one.name == name), None)) for run in found.values()]
        unit = "" if figure.unit == "share" else figure.unit
        lines.append([figure.label, *cells, unit])
    return _table(["", *found, ""], lines)


def _sweep(found: Mapping[str, Run], headlines: Sequence[str]) -> Iterator[str]:
    for name in headlines:
        values = {label: value for label, run in found.items() if (value := run.figure(name)) is not None}
        figure = next((one for run in found.values() for one in run.figures if one.name == name), None)
        if figure is not None and values:
            yield f"<figure><figcaption>Sweep: {escape(figure.label)}</figcaption>"
            yield plots.bars(values, figure.unit, figure.label)
            yield "</figure>"


def _where_time_goes(found: Mapping[str, Run]) -> Iterator[str]:
    stacks = [
        Bar(name, tuple(_segments(run.stages)), run.figure("step_ms_p50")) for name, run in found.items() if run.stages
    ]
    used = {segment.name: segment.style for bar in stacks for segment in bar.segments}
    yield "<figure><figcaption>Where a step's time goes</figcaption>"
    yield plots.stacked_bars(stacks, "ms", "time of a step, by stage", _REAL_STEP)
    yield plots.legend(used, _REAL_STEP)
    yield "</figure>"


def _segments(stages: Sequence[Stage]) -> Iterator[Segment]:
    for stage in stages:
        if not stage.per_block:
            yield Segment(stage.name, stage.ms, _STYLES.get(stage.name, "other2"))


def _details(name: str, run: Run) -> Iterator[str]:
    for series in run.series:
        if series.deadline is not None and series.values:
            yield _block_times(name, series)
    if run.suite == step.SUITE:
        yield f"<h3>{escape(name)}: stages</h3>{_table(STAGE_HEADINGS, list(stage_lines(run.stages)))}"
    if run.suite == ablation.SUITE:
        yield from _ablation(name, run.rows)
    if run.suite == kernels.SUITE:
        yield from _kernels(run)
    if run.suite == compare.SUITE:
        yield from _comparison(name, run)
    if run.suite == TPP:
        if tpp.draws_a_timeline(run):
            yield f"<figure><figcaption>{escape(CAPTION)}: {escape(name)}</figcaption>{timeline(run)}</figure>"
        for title, headings, lines in tpp.tables(run):
            yield f"<h3>{escape(name)}: {escape(title)}</h3>{_table(headings, lines)}"


def _block_times(name: str, series: Series) -> str:
    lines = {"p50": (series.p50, "p50"), "p99": (series.p99, "p99")}
    if series.deadline is not None:
        lines["deadline"] = (series.deadline, "deadline")
    plot = plots.over_time(series.values, series.unit, series.label, lines)
    caption = f"{name}: {series.label}; beyond the deadline: {series.misses} of {len(series.values)}"
    return f"<figure><figcaption>{escape(caption)}</figcaption>{plot}</figure>"


def _ablation(name: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    measured = {row["name"]: row["fps"] for row in rows if row["fps"] is not None}
    if measured:
        yield f"<figure><figcaption>{escape(name)}: frames/s, whole pipeline</figcaption>"
        yield plots.bars(measured, "frames/s", "whole pipeline", 25.0)
        yield "<p>The line is real time, 25 frames/s.</p></figure>"
    headings = ["variant", "devices", "fps", "ttff (s)", "memory (MiB)", "paper: fps", "ttff (s)", "T.Flicker", ""]
    lines = []
    for row in rows:
        published = row["paper"] or {}
        lines.append(
            [
                row["name"],
                str(row["devices"]),
                maybe(row["fps"], "{:.2f}"),
                maybe(row["ttff_s"], "{:.2f}"),
                maybe(row["memory_mb"], "{:,.0f}"),
                maybe(published.get("optimised_fps") or published.get("fps"), "{:.2f}"),
                maybe(published.get("optimised_ttff") or published.get("ttff"), "{:.2f}"),
                maybe(published.get("flicker"), "{:.3f}"),
                row["reason"] or "",
            ]
        )
    yield _table(headings, lines)


def _comparison(name: str, run: Run) -> Iterator[str]:
    steps = {key: run.figure(f"{key}_step_ms") for key in ("reference", "engine")}
    values = {key: value for key, value in steps.items() if value is not None}
    if values:
        yield f"<figure><figcaption>{escape(name)}: a step of either side</figcaption>"
        yield plots.bars(values, "ms", "a step, its share of a median block")
        yield "</figure>"
    if run.rows:
        lines = [[row["name"], row["instead"], row["reason"]] for row in run.rows]
        yield f"<h3>{escape(name)}: what stood in</h3>{_table(['for', 'came', 'because'], lines)}"


def _kernels(run: Run) -> Iterator[str]:
    rows = kernels.rows_of(run)
    best = [row for op in dict.fromkeys(row.op for row in rows) for row in fastest(rows, op)]
    ratios = {f"{row.op}: {row.case}": row.ratio for row in best if row.ratio is not None}
    if ratios:
        yield "<figure><figcaption>Our fastest kernel: times as fast as the best library call</figcaption>"
        yield plots.bars(ratios, "", "times as fast (the line: equal)", 1.0)
        yield "</figure>"
    headings = ["op", "case", "implementation", "us", "TFLOP/s", "GB/s", "compute", "memory", "ratio", ""]
    yield _table(
        headings,
        [
            [
                row.op,
                row.case,
                row.implementation,
                maybe(row.us, "{:,.1f}"),
                maybe(row.tflops, "{:,.0f}"),
                maybe(row.gbps, "{:,.0f}"),
                maybe(row.compute_share, "{:.0%}"),
                maybe(row.memory_share, "{:.0%}"),
                maybe(row.ratio, "{:.2f}"),
                "" if row.status == ROW_MEASURED else f"{row.status}: {row.reason}",
            ]
            for row in rows
        ],
    )


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
