"""`inspect`: a checkpoint's parts, memory and losses in FP8; this machine's kernels; the layout of several devices."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..bench.layout import add_cost_arguments
from ..config import EngineConfig
from ..config.engine import PRECISIONS
from ..errors import CheckpointError, InputError
from .inspect_devices import show_devices
from .inspect_kernels import show_kernels
from .inspect_precision import show_precision
from .settings import FP8_SKIP_HELP, OFFLOAD_HELP, fp8_skip, offload

if TYPE_CHECKING:
    from ..weights.report import CheckpointReport, PartReport

EXIT_UNUSABLE = 1
_MAX_NAMES = 20
_PRECISIONS = ("auto", *PRECISIONS)
_REPORT = "report"

_EXAMPLES = """examples:
  liveavatar-engine inspect ckpt/Wan2.2-S2V-14B
  liveavatar-engine inspect ckpt/Wan2.2-S2V-14B --size 720x400 --precision fp8 --sessions 2
  liveavatar-engine inspect --kernels
  liveavatar-engine inspect --devices 5
  liveavatar-engine inspect ckpt/Wan2.2-S2V-14B --devices 5 --size 704x384 --precision fp8
  liveavatar-engine inspect --devices 5 --sequence-parallel 2 --step-ms 110 --vae-ms 60
  liveavatar-engine inspect --devices cuda:0,cuda:1,cuda:2 --costs results.json
  liveavatar-engine inspect ckpt/Wan2.2-S2V-14B --precision --image face.jpg --audio speech.wav --json losses.json

--kernels shows what can compute each op on this machine, and why the rest cannot. --devices shows which of several
devices would do which denoise steps, and the speed that follows from what a step and a decode cost; with DIR also the
memory that each of them needs. --precision without
a value runs the network and shows the signal to noise that every linear layer would have in FP8: what --fp8-skip is
chosen by.
Without these, only file headers of the network are read. An area (W*H) is taken for a 16:9 picture.
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
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="checkpoint in the reference's layout")
    parser.add_argument("--kernels", action="store_true", help="show this machine's kernels; DIR is not needed")
    parser.add_argument(
        "--size", default=EngineConfig.size, metavar="W*H|WxH", help="of the video (default %(default)s)"
    )
    parser.add_argument(
        "--precision",
        nargs="?",
        const=_REPORT,
        metavar="P",
        help=f"{', '.join(_PRECISIONS)} (default: what the checkpoint was converted to, else bf16); without a value: "
        "report each layer's loss in FP8",
    )
    parser.add_argument("--kv-precision", choices=_PRECISIONS, default="auto", help="of ring and sink (default auto)")
    parser.add_argument("--fp8-skip", metavar="NAME[,NAME...]", help=FP8_SKIP_HELP)
    parser.add_argument("--steps", type=int, default=EngineConfig.steps, metavar="N", help="denoise steps (default 4)")
    parser.add_argument("--sessions", type=int, default=1, metavar="N", help="open at the same time (default 1)")
    parser.add_argument(
        "--device", default="auto", metavar="D", help="cuda or cpu; a GPU need not be there (default: a GPU)"
    )
    parser.add_argument("--schedule", choices=("sequential", "diagonal"), default="sequential", help="of the steps")
    parser.add_argument("--kv-mode", choices=("timestep", "clean"), default="timestep", help="of the rings")
    parser.add_argument("--offload", metavar="PART[,PART...]", help=OFFLOAD_HELP)
    layout = parser.add_argument_group("the layout of several devices")
    layout.add_argument("--devices", metavar="N|A,B...", help="how many GPUs, or which; with DIR: also their memory")
    layout.add_argument("--sequence-parallel", type=int, default=1, metavar="K", help="that share a step (default 1)")
    add_cost_arguments(layout)
    report = parser.add_argument_group("for the report of --precision")
    report.add_argument("--lora", type=Path, metavar="FILE", help="LoRA adapter to merge (safetensors or PyTorch)")
    report.add_argument("--image", type=Path, metavar="F", help="portrait (default: a synthetic one)")
    report.add_argument("--audio", type=Path, metavar="F", help="speech (default: synthetic noise)")
    report.add_argument("--prompt", default="", metavar="T", help="what the scene shows")
    report.add_argument("--blocks", type=int, default=1, metavar="N", help="blocks to measure (default 1)")
    report.add_argument("--json", type=Path, metavar="FILE", help="write all layers there")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    console = Console()
    if arguments.kernels:
        show_kernels(console)
        return 0
    if arguments.devices is not None:
        config = None if arguments.folder is None else _config(arguments, sequence_parallel=arguments.sequence_parallel)
        show_devices(arguments, config, console)
        return 0
    for name in ("step_ms", "vae_ms", "transfer_ms", "costs"):
        if getattr(arguments, name) is not None:
            raise InputError(f"inspect: --{name.replace('_', '-')} belongs to --devices")
    if arguments.folder is None and arguments.precision is not None and Path(arguments.precision).is_dir():
        arguments.folder, arguments.precision = Path(arguments.precision), _REPORT  # inspect --precision DIR
    if arguments.folder is None:
        raise InputError("inspect: name a checkpoint's folder, or ask for --kernels or --devices")
    config = _config(arguments)
    if arguments.precision == _REPORT:
        show_precision(arguments, config, console)
        return 0
    from ..weights.report import inspect_checkpoint

    report = inspect_checkpoint(arguments.folder, config=config)
    console.print(_parts_table(report))
    for line in _problems(report):
        console.print(line, markup=False, style="red", soft_wrap=True)
    if report.conversion is not None:
        console.print(str(report.conversion), markup=False, soft_wrap=True)
    if report.memory is not None and report.geometry is not None:
        console.print(_model_line(report), markup=False, soft_wrap=True)
        console.print(_memory_table(report))
        console.print(_room_line(report), soft_wrap=True)
    console.print("ready to use" if report.ok else "an engine cannot load this checkpoint", style="bold")
    return 0 if report.ok else EXIT_UNUSABLE


def _config(arguments: argparse.Namespace, **more: Any) -> EngineConfig:
    """Of the engine that the questions are about."""
    reports = arguments.precision == _REPORT
    return EngineConfig(
        size=arguments.size,
        precision="auto" if reports else arguments.precision or _precision_of(arguments.folder),
        kv_precision=arguments.kv_precision,
        fp8_skip=fp8_skip(arguments.fp8_skip),
        steps=arguments.steps,
        max_sessions=arguments.sessions,
        devices=arguments.device,
        schedule=arguments.schedule,
        kv_mode=arguments.kv_mode,
        offload=offload(arguments.offload),
        **more,
    )


def _precision_of(folder: Path) -> str:
    """What a checkpoint was converted to, else bf16; what is wrong with it stands in the report."""
    from ..weights.conversion import Conversion

    try:
        conversion = Conversion.of(folder)
    except CheckpointError:
        return "bf16"
    return "bf16" if conversion is None else conversion.precision


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
    kind = "the CPU" if report.device.type == "cpu" else "one GPU"
    table = Table(title=f"memory on {kind}", title_justify="left", show_footer=True)
    table.add_column("what", footer="total")
    table.add_column("bytes", justify="right", footer=decimal(memory.total))
    table.add_column("")
    for row in memory.rows:
        table.add_row(row.name, decimal(row.bytes), row.note)
    return table


def _room_line(report: CheckpointReport) -> str:
    """Whether it fits, where the device is there."""
    import torch

    from ..weights.budget import free_memory

    assert report.memory is not None
    if report.device.type == "cuda" and torch.cuda.device_count() <= (report.device.index or 0):
        return "this machine has no such GPU to compare with"
    free = free_memory(report.device)
    if free is None:
        return "this machine does not tell how much memory is free"
    return f"free on this machine: {decimal(free)}, {'enough' if report.memory.total <= free else 'too little'}"
