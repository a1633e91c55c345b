"""The suite `tpp`: who answers it, and the tables of what came of it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from ..bench import Bench
from ..results import Run
from ..settings import Settings
from . import one_device, simulated, streams
from .options import ONE_DEVICE, SIMULATED, SLEEPING, TppOptions

COMPARISON = ("", "measured", "simulated", "difference")
LAYOUTS = ("devices", "sessions", "layout", "frames/s", "block (ms)", "first frame (s)", "in real time")
LAYOUTS_TITLE = "Simulated from the stage times measured here: what so many such devices would do"
COMPARISON_TITLE = "Measured, and simulated with the stage times that were measured"


def measure(options: TppOptions, settings: Settings, bench: Bench) -> Run:
    """Predict, or run, a pipeline.

    Raises:
        LiveAvatarError: there is no such layout, or it cannot be run here.
        OutputError: the timeline cannot be written.
    """
    if options.mode == SIMULATED:
        return simulated.measure(options)
    if options.mode == SLEEPING:
        return streams.measure_rehearsal(options, settings, bench)
    if options.mode == ONE_DEVICE:
        return one_device.measure(options, settings, bench)
    return streams.measure_pipeline(options, settings, bench)


def comparison_lines(run: Run) -> list[tuple[str, ...]]:
    """The cells under COMPARISON, a line for each figure that was both measured and simulated."""
    lines = []
    for label, measured, predicted, unit in streams.comparison(run):
        share = unit == "share"
        cells = (f"{value:.1%}" if share else f"{value:.4g} {unit}" for value in (measured, predicted))
        difference = f"{measured / predicted - 1:+.1%}" if predicted else "-"
        lines.append((label, *cells, difference))
    return lines


def layout_lines(run: Run) -> list[tuple[str, ...]]:
    """The cells under LAYOUTS, a line for each layout that was simulated from measured stage times."""
    return [
        (
            str(row["devices"]),
            str(row["sessions"]),
            row["layout"],
            f"{row['fps']:.1f}",
            f"{row['bottleneck_ms']:.4g}",
            f"{row['first_frame_s']:.3g}",
            str(row["real_time_sessions"]),
        )
        for row in run.rows
        if run.settings.get("mode") == ONE_DEVICE
    ]


def draws_a_timeline(run: Run) -> bool:
    """Whether a run's rows are spans."""
    return run.settings.get("mode") != ONE_DEVICE


def tables(run: Run) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, headings and lines of the tables that only this suite has."""
    for title, headings, lines in (
        (COMPARISON_TITLE, COMPARISON, comparison_lines(run)),
        (LAYOUTS_TITLE, LAYOUTS, layout_lines(run)),
    ):
        if lines:
            yield title, headings, lines


def table(title: str, headings: tuple[str, ...], lines: list[tuple[str, ...]]) -> Table:
    """Lines for a terminal."""
    made = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        made.add_column(heading, justify="right" if index and heading != "layout" else "left")
    for line in lines:
        made.add_row(*(Text(cell) for cell in line))
    return made
