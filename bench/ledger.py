"""The ledger: one line for each suite that was measured on a GPU, and the README's section of the newest ones.

python -m bench.ledger --readme                      write the newest rows into README.md, between its markers
python -m bench.ledger --add build/results           take over the rows of a folder that a gate wrote elsewhere
python -m bench.ledger                               show the newest rows
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from liveavatar_engine.bench.results import MEASURED
from liveavatar_engine.errors import InputError, LiveAvatarError
from liveavatar_engine.files import write_atomically

FOLDER = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- ledger:start -->", "<!-- ledger:end -->"
DRY_RUN = "dry-run"
"""Stem of the file for rows that no GPU has made: they say that the machinery works, and nothing about speed."""

Row = dict[str, Any]
_FIELDS = (
    ("suite", str),
    ("commit", str),
    ("dirty", bool),
    ("device", str),
    ("device_kind", str),
    ("versions", dict),
    ("command", str),
    ("date", str),
    ("settings", dict),
    ("figures", dict),
)
_HEADLINES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "kernels": (
        ("attention_bf16_ratio", "attention bf16 {:.2f}x the best library"),
        ("attention_e4m3_ratio", "attention e4m3 {:.2f}x"),
        ("linear_e4m3_ratio", "FP8 GEMM {:.2f}x"),
    ),
    "step": (
        ("step_ms_p50", "{:.1f} ms a step"),
        ("step_p99_over_p50", "p99/p50 {:.3f}"),
        ("host_ms_p50", "host {:.2f} ms"),
    ),
    "vae": (("decode_ms_p50", "decode {:.1f} ms a block"), ("encode_ms", "encode {:.0f} ms")),
    "stream": (
        ("steady_fps", "{:.1f} frames/s"),
        ("ttff_s", "first frame {:.2f} s"),
        ("deadline_misses", "{:.0f} deadlines missed"),
        ("memory_mb", "{:,.0f} MiB"),
    ),
}
"""What the README tells of each suite: figure and words."""
_SHOWN = ("preset", "size", "precision", "kv_precision", "schedule")


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """A row for every run of a complete document that measured something and found nothing wrong."""
    environment = document["environment"]
    if not document["complete"]:
        return []
    return [
        {
            "suite": run["suite"],
            **{
                key: environment[key]
                for key in ("commit", "dirty", "device", "device_kind", "versions", "command", "date")
            },
            "settings": run["settings"],
            "figures": {
                name: figure["value"] for name, figure in run["figures"].items() if figure["value"] is not None
            },
        }
        for run in document["runs"]
        if run["status"] == MEASURED and not run["problems"]
    ]


def append(folder: Path, rows: Iterable[Row]) -> list[Path]:
    """Append rows that are not there yet, each to the file of its suite; those of a CPU to that of dry runs.

    Returns:
        The files that have grown.

    Raises:
        InputError: a file there is no ledger.
        OutputError: a file cannot be written.
    """
    grown = []
    by_file: dict[Path, list[Row]] = {}
    for row in rows:
        stem = row["suite"] if row["device_kind"] == "cuda" else DRY_RUN
        by_file.setdefault(folder / f"{stem}.jsonl", []).append(row)
    for path, new in by_file.items():
        before = read_file(path) if path.is_file() else []
        missing = [row for row in new if row not in before]
        if missing:
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in [*before, *missing]))
            grown.append(path)
    return grown


def read(folder: Path) -> list[Row]:
    """All rows of a folder that a GPU has made, oldest first.

    Raises:
        InputError: a file there is no ledger.
    """
    rows = [row for path in sorted(folder.glob("*.jsonl")) if path.stem != DRY_RUN for row in read_file(path)]
    return sorted((row for row in rows if row["device_kind"] == "cuda"), key=lambda row: row["date"])


def read_file(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        InputError: a line is no row.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from None
        wrong = [name for name, kind in _FIELDS if not isinstance(row, dict) or not _fits(row.get(name), kind)]
        if wrong:
            raise InputError(f"{path}, line {number}: no ledger row, {wrong[0]} is missing or of another type")
        rows.append(row)
    return rows


def newest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each suite, device and settings, in the order of the suites."""
    last = {(row["suite"], row["device"], _told(row["settings"])): row for row in rows}
    order = {suite: number for number, suite in enumerate(_HEADLINES)}
    return sorted(last.values(), key=lambda row: order.get(row["suite"], len(order)))


def section(rows: Sequence[Row]) -> str:
    """The README's section, with the date of the newest row."""
    latest = newest(rows)
    if not latest:
        return "No figure of a GPU has been measured yet.\n"
    date = max(row["date"] for row in latest)[:10]
    lines = [f"Measured with `make gpu-gate`, newest on {date}. Random weights of the real sizes.", ""]
    lines += ["| suite | device | settings | measured | date | commit |", "|---|---|---|---|---|---|"]
    for row in latest:
        cells = (row["suite"], row["device"], _told(row["settings"]), _headline(row), row["date"][:10], _commit(row))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_section(text: str, rows: Sequence[Row]) -> str:
    """A README with the section between its markers in place of what stood there.

    Raises:
        InputError: the markers are not there once each, in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise InputError(f"expected one line {START} and behind it one line {END}")
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n{section(rows)}{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ledger", type=Path, default=FOLDER, metavar="DIR", help="default bench/results")
    parser.add_argument("--add", type=Path, metavar="DIR", help="append the rows of another folder first")
    parser.add_argument("--readme", type=Path, nargs="?", const=README, metavar="FILE", help="default README.md")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False)
    try:
        if options.add is not None:
            grown = append(options.ledger, read(options.add))
            console.print(f"rows added to {', '.join(map(str, grown)) or 'nothing'}", markup=False)
        rows = read(options.ledger)
        if options.readme is None:
            console.print(section(rows), markup=False)
            return 0
        try:
            text = options.readme.read_text(encoding="utf-8")
            write_atomically(options.readme, with_section(text, rows))
        except (OSError, InputError) as error:
            raise InputError(f"{options.readme}: {error}") from None
        console.print(f"{options.readme}: {len(newest(rows))} rows", markup=False)
    except LiveAvatarError as error:
        sys.stderr.write(f"bench.ledger: error: {error}\n")
        return 2
    return 0


def _fits(value: Any, kind: type) -> bool:
    return isinstance(value, kind) or (kind is bool and value is None)


def _headline(row: Row) -> str:
    found = row["figures"]
    return ", ".join(words.format(found[name]) for name, words in _HEADLINES.get(row["suite"], ()) if name in found)


def _told(settings: Mapping[str, Any]) -> str:
    parts = [(key, settings[key]) for key in _SHOWN if settings.get(key) not in (None, "auto", "sequential")]
    return ", ".join(f"kv {value}" if key == "kv_precision" else str(value) for key, value in parts) or "14b sizes"


def _commit(row: Row) -> str:
    return row["commit"][:8] + (" with changes" if row["dirty"] else "")


if __name__ == "__main__":
    sys.exit(main())
