"""`inspect`: what is in a checkpoint, what is missing, the memory it needs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..config import EngineConfig

if TYPE_CHECKING:
    from ..weights.report import CheckpointReport, PartReport

EXIT_UNUSABLE = 1
_MAX_NAMES = 20

_EXAMPLES = """examples:
  liveavatar-engine inspect ckpt/Wan2.2-S2V-14B
  liveavatar-engine inspect ckpt/Wan2.2-S2V-14B --size 720x400 --precision bf16 --sessions 2

Of the network only file headers are read. An area (W*H) is taken for a 16:9 picture.
The exit code is 0 when an engine can load the checkpoint, 1 when not.
"""


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="show what is in a checkpoint and the memory it needs",
        description="Show what is in a checkpoint, what is missing or unexpected, and the memory it needs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=Path, metavar="DIR", help="checkpoint in the reference's layout")
    parser.add_argument(
        "--size", default=EngineConfig.size, metavar="W*H|WxH", help="of the video (default %(default)s)"
    )
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="bf16", help="default %(default)s")
    parser.add_argument("--steps", type=int, default=EngineConfig.steps, metavar="N", help="denoise steps (default 4)")
    parser.add_argument("--sessions", type=int, default=1, metavar="N", help="open at the same time (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    config = EngineConfig(
        size=arguments.size,
        precision=arguments.precision,
        steps=arguments.steps,
        max_sessions=arguments.sessions,
    )
    from ..weights.report import inspect_checkpoint

    report = inspect_checkpoint(arguments.folder, config=config)
    console = Console()
    console.print(_parts_table(report))
    for line in _problems(report):
        console.print(line, markup=False, style="red", soft_wrap=True)
    if report.memory is not None and report.geometry is not None:
        console.print(_model_line(report), markup=False, soft_wrap=True)
        console.print(_memory_table(report))
    console.print("ready to use" if report.ok else "an engine cannot load this checkpoint", style="bold")
    return 0 if report.ok else EXIT_UNUSABLE


def _parts_table(report: CheckpointReport) -> Table:
    table = Table(title=str(report.folder), title_justify="left")
    for heading in ("part", "files", "tensors", "parameters", "dtypes", "on disk", "state"):
        numeric = heading in ("files", "tensors", "parameters", "on disk")
        table.add_column(heading, justify="right" if numeric else "left")
    for part in report.parts:
        dtypes = ", ".join(sorted(part.dtypes, key=lambda dtype: -part.dtypes[dtype]))
        table.add_row(
            part.name,
            str(len(part.files)),
            str(len(part.tensors) or "-"),
            f"{part.parameters:,}" if part.tensors else "-",
            dtypes or "-",
            decimal(part.bytes),
            _state(report, part),
        )
    return table


def _state(report: CheckpointReport, part: PartReport) -> str:
    if not part.present:
        return "missing"
    misfits = part.name == "network" and bool(report.mismatch)
    return "ok" if part.ok and not misfits else "unusable"


def _problems(report: CheckpointReport) -> Iterator[str]:
    for part in report.parts:
        for problem in part.problems:
            yield f"{part.name}: {problem}"
    mismatch = report.mismatch
    if mismatch is None or not report["network"].tensors:
        return
    shapes = tuple(f"{wrong.name} is {list(wrong.found)}, not {list(wrong.expected)}" for wrong in mismatch.misshapen)
    for kind, names in (("missing", mismatch.missing), ("unexpected", mismatch.unexpected), ("wrong shape", shapes)):
        for name in names[:_MAX_NAMES]:
            yield f"network: {kind}: {name}"
        if len(names) > _MAX_NAMES:
            yield f"network: {kind}: and {len(names) - _MAX_NAMES} more"


def _model_line(report: CheckpointReport) -> str:
    model, geometry = report.model, report.geometry
    assert model is not None
    assert geometry is not None
    return (
        f"network: {model.num_layers} layers, dim {model.dim}, {model.num_heads} heads of {model.head_dim}, "
        f"FFN {model.ffn_dim}; at {geometry.width}x{geometry.height}: {geometry.tokens_per_block} tokens a block, "
        f"ring {geometry.ring_tokens}, sink {geometry.sink_tokens}"
    )


def _memory_table(report: CheckpointReport) -> Table:
    memory = report.memory
    assert memory is not None
    table = Table(title="memory on one device", title_justify="left", show_footer=True)
    table.add_column("what", footer="total")
    table.add_column("bytes", justify="right", footer=decimal(memory.total))
    table.add_column("")
    for row in memory.rows:
        table.add_row(row.name, decimal(row.bytes), row.note)
    return table
