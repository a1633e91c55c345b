"""The rows for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from .rows import ABSENT, MEASURED, SKIPPED, Row
from .targets import MET, MISSED, Verdict

_COLOURS = {MET: "green", MISSED: "red"}


_NOT_RUN = (ABSENT, SKIPPED)


def table(rows: Sequence[Row]) -> Table:
    """A line per row that was tried, a section per case."""
    columns = ("op", "case", "implementation", "us", "p10 - p90", "TFLOP/s", "GB/s", "compute", "memory", "ratio", "")
    found = Table(*columns, title="compute and memory: shares of the datasheet; ratio: to the fastest library")
    for column in found.columns[3:10]:
        column.justify = "right"
    before = None
    for row in rows:
        if row.status in _NOT_RUN:
            continue
        same = (row.op, row.case) == before
        if before is not None and not same:
            found.add_section()
        before = (row.op, row.case)
        head = ("", "") if same else before
        found.add_row(*(Text(cell) for cell in (*head, row.implementation, *_numbers(row), _remark(row))))
    return found


def not_run(rows: Sequence[Row]) -> Table:
    """What was not tried, and why."""
    why = Counter((row.op, row.implementation, row.status, row.reason or "") for row in rows if row.status in _NOT_RUN)
    found = Table("op", "implementation", "", "why", "cases", title="not run")
    for cells, count in why.items():
        found.add_row(*map(Text, cells), Text(str(count)))
    return found


def line(op: str, case: str, rows: Sequence[Row]) -> str:
    """A case in one line, for progress."""
    parts = [
        f"{row.implementation} {row.us:,.1f} us" if row.us is not None else f"{row.implementation} {row.status}"
        for row in rows
        if row.status not in _NOT_RUN
    ]
    return f"{op} · {case}: {', '.join(parts) or 'nothing can run'}"


def target_table(verdicts: Sequence[Verdict]) -> Table:
    """A line per target, with its worst case."""
    found = Table("target", "at least", "verdict", "worst", title="targets")
    for one in verdicts:
        worst = min(one.numbers, key=lambda case: one.numbers[case], default=None)
        told = "" if worst is None else f"{one.numbers[worst]:.2f} ({worst})"
        verdict = Text(one.verdict, style=_COLOURS.get(one.verdict, "yellow"))
        found.add_row(Text(one.target), f"{one.least:g}", verdict, Text(told))
    return found


def _numbers(row: Row) -> tuple[str, ...]:
    if row.us is None:
        return ("",) * 7
    return (
        f"{row.us:,.1f}",
        f"{row.us_p10:,.1f} - {row.us_p90:,.1f}",
        _number(row.tflops),
        _number(row.gbps),
        _share(row.compute_share),
        _share(row.memory_share),
        "" if row.ratio is None else f"{row.ratio:.2f}",
    )


def _remark(row: Row) -> str:
    if row.status != MEASURED:
        return f"{row.status}: {row.reason}"
    return "" if row.note is None else f"{row.how}: {row.note}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
