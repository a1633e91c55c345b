"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from ..config import EngineConfig
from ..config.engine import PRECISIONS
from ..errors import ConfigError, LiveAvatarError
from ..files import check_writable, write_atomically
from ..pipeline.device import resolve_device
from ..weights.presets import PRESETS
from . import html, screen
from .bench import Bench
from .compare import suite as compare
from .compare.report import SUITE as COMPARE
from .environment import describe
from .kernels import suite as kernels
from .results import Report
from .runner import SUITES, Plan, exit_code, run_plan
from .settings import CPU_PRESET, CPU_SIZE, GPU_PRESET, GPU_SIZE, Settings, on_or_off, parse_sweep, sweep_points
from .tpp.options import SUITE as TPP
from .tpp.options import TppOptions, chosen_devices
from .tpp.options import add_arguments as add_tpp_arguments
from .tpp.options import check_unused as check_tpp_unused

PROGRAM = "python -m liveavatar_engine.bench"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_DESCRIPTION = """Measure the engine on this machine.

suites:
  kernels    every kernel at the 14B model's sizes: checked, timed, compared with the best library call (GPU only)
  step       one denoise step, whole and stage by stage
  vae        decoding, encoding the picture, priming
  stream     the whole pipeline: frames/s, time to first frame, missed deadlines, memory
  ablation   the paper's Tables 3 and 6 for this machine
  all        all of these (the default)
  compare    the reference's own code beside the engine: docs/compare.md
  tpp        a pipeline over several devices; on one: its stages in turn, and what several such devices would do;
             --simulate predicts from costs alone, --sleep runs real processes whose stages only take their time
"""
_EXAMPLES = """examples:
  python -m liveavatar_engine.bench                                         everything; 14B random weights on a GPU
  python -m liveavatar_engine.bench step --preset 14b --precision fp8 --kv-precision fp8 --html step.html
  python -m liveavatar_engine.bench stream --checkpoint ckpt/Wan2.2-S2V-14B --size 704x384 --json stream.json
  python -m liveavatar_engine.bench step --sweep size=704x384,720x400 precision=bf16,fp8 --html sweep.html
  python -m liveavatar_engine.bench all --preset tiny --size 64x64 --device cpu --blocks 3 --warmup 1
  python -m liveavatar_engine.bench kernels --op ring_attention --filter "3375 tokens"
  python -m liveavatar_engine.bench tpp --simulate --step-ms 110 --vae-ms 60 --devices 5 --html pipeline.html
  python -m liveavatar_engine.bench tpp --devices 5 --preset 14b --trace trace.json --html pipeline.html
  python -m liveavatar_engine.bench tpp --sleep --step-ms 110 --vae-ms 60 --devices 5

--sweep takes KEY=VALUE[,VALUE...] as often as you like, with spaces or commas in between; every combination is run.
Keys: size, precision, kv_precision, steps, schedule, kv_mode, graphs (on, off), motion_tokens (on, off), preset.
docs/tuning.md says what each figure means, and what to try in which order.
Exit codes: 0; 1 a suite failed or a kernel is wrong; 2 the request cannot be run; 130 after Ctrl-C.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, and says what is wrong in one line on the error stream."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return _run(options, sys.argv[1:] if arguments is None else arguments)
    except (LiveAvatarError, torch.OutOfMemoryError) as error:
        sys.stderr.write(f"{PROGRAM}: error: {error}\n")
        return EXIT_ERROR
    except KeyboardInterrupt:
        kept = options.json is not None and options.json.is_file()
        sys.stderr.write(f"{PROGRAM}: interrupted{f'; {options.json} holds what was finished' if kept else ''}\n")
        return EXIT_INTERRUPTED


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    for path in (options.json, options.html, options.trace):
        if path is not None:
            check_writable(path)
    device = _device(options)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    plan = _plan(options, device)
    environment = describe(device, shlex.join([*PROGRAM.split(), *arguments]), options.commit)
    bench = Bench(device, environment, Console(stderr=True, soft_wrap=True, highlight=False))

    def save(report: Report) -> None:
        if options.json is not None:
            write_atomically(options.json, report.as_json())

    report = run_plan(plan, bench, save)
    if options.html is not None:
        write_atomically(options.html, html.render(report))
    screen.show(report)
    return exit_code(report)


def _device(options: argparse.Namespace) -> torch.device:
    """That is measured on; the first one of a pipeline."""
    if options.suite == TPP and not options.simulate:
        return resolve_device(chosen_devices(options)[:1])
    return resolve_device(EngineConfig(devices=options.device).devices)


def _plan(options: argparse.Namespace, device: torch.device) -> Plan:
    suites = SUITES if options.suite == "all" else (options.suite,)
    sweep = parse_sweep(options.sweep)
    base = _settings(options, device, sweep.pop("preset", None))
    _check_belongings(options)
    kernel_options = kernels.KernelOptions(
        tuple(options.op),
        options.filter,
        tuple(filter(None, options.implementations.split(","))),
        options.quick,
        options.choose,
        options.seed,
    )
    points = tuple(point for one in base for point in sweep_points(one, sweep))
    isolated = options.suite == "all" or len(points) > 1
    tpp_options = TppOptions.of(options) if options.suite == TPP else None
    return Plan(suites, points, kernel_options, compare.CompareOptions.of(options), isolated, tpp_options)


def _settings(options: argparse.Namespace, device: torch.device, presets: Sequence[str] | None) -> list[Settings]:
    """One point for each preset."""
    on_gpu = device.type == "cuda"
    if options.lora is not None and options.checkpoint is None:
        raise ConfigError("--lora needs --checkpoint: random weights take no adapter")
    if presets and (options.checkpoint is not None or options.preset is not None):
        raise ConfigError("--sweep preset=... does not go with --preset or --checkpoint")
    names: Sequence[str | None] = presets or [options.preset or (GPU_PRESET if on_gpu else CPU_PRESET)]
    return [
        Settings(
            preset=None if options.checkpoint is not None else name,
            checkpoint=_text(options.checkpoint),
            lora=_text(options.lora),
            vae=_text(options.vae),
            device=str(device),
            size=options.size or (GPU_SIZE if on_gpu or options.sleep else CPU_SIZE),
            precision=options.precision,
            kv_precision=options.kv_precision,
            steps=options.steps,
            schedule=options.schedule,
            kv_mode=options.kv_mode,
            graphs=not options.no_graphs,
            motion_tokens=on_or_off("--motion-tokens", options.motion_tokens),
            blocks=options.blocks,
            warm_up=options.warmup,
            seed=options.seed,
        )
        for name in names
    ]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _check_belongings(options: argparse.Namespace) -> None:
    """Refuse options of the suites `kernels`, `compare` and `tpp` where these do not run alone."""
    if (options.suite == COMPARE) != (options.reference is not None):
        raise ConfigError(
            "compare needs --reference DIR, a checkout of the reference"
            if options.reference is None
            else f"--reference belongs to the suite compare, not to {options.suite}"
        )
    if options.suite != TPP:
        check_tpp_unused(options)
    if options.suite in (kernels.SUITE, TPP) and options.sweep:
        own = "sizes, those of the 14B model" if options.suite == kernels.SUITE else "options: --devices and costs"
        raise ConfigError(f"--sweep: the suite {options.suite} has its own {own}")
    if options.suite == kernels.SUITE:
        return
    given = [name for name in ("op", "filter", "implementations", "choose") if getattr(options, name)]
    if given:
        raise ConfigError(f"--{given[0]} belongs to the suite kernels, not to {options.suite}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suites = (*SUITES, COMPARE, TPP, "all")
    parser.add_argument("suite", nargs="?", default="all", choices=suites, metavar="SUITE", help=", ".join(suites))
    _add_model(parser)
    _add_engine(parser)
    measure = parser.add_argument_group("how much")
    measure.add_argument("--blocks", type=int, default=20, metavar="N", help="blocks to measure (default %(default)s)")
    measure.add_argument("--warmup", type=int, default=5, metavar="N", help="blocks to leave out (default %(default)s)")
    measure.add_argument(
        "--sweep", nargs="+", default=[], metavar="K=V[,V...]", help="run every combination; see below"
    )
    output = parser.add_argument_group("results, besides the tables on screen")
    output.add_argument("--json", type=Path, metavar="F", help="everything, raw times included")
    output.add_argument("--html", type=Path, metavar="F", help="one self-contained page with plots")
    output.add_argument("--commit", metavar="C", help="of this code, where it lies in no repository")
    only = parser.add_argument_group("suite kernels")
    only.add_argument("--op", nargs="+", default=[], choices=kernels.OP_NAMES, metavar="NAME", help="of %(choices)s")
    only.add_argument("--filter", default="", metavar="TEXT", help="only cases whose op and name contain it")
    only.add_argument("--implementations", default="", metavar="A,B", help="only these, such as triton,cudnn")
    only.add_argument("--quick", action="store_true", help="one picture size, fewer repeats: under two minutes")
    only.add_argument("--choose", action="store_true", help="write fp8_linear/choices.json from what was measured")
    compare.add_arguments(parser)
    add_tpp_arguments(parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    weights = model.add_mutually_exclusive_group()
    weights.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=f"random weights, made on the device (default: {GPU_PRESET} on a GPU, {CPU_PRESET} on a CPU)",
    )
    weights.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint instead")
    model.add_argument("--lora", type=Path, metavar="FILE", help="LoRA adapter to merge into it")
    model.add_argument("--vae", type=Path, metavar="FILE", help="a light decoder, measured beside the VAE's own")
    model.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and inputs (default %(default)s)")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")

    def choice(name: str, choices: Sequence[str], default: str, text: str) -> None:
        engine.add_argument(name, choices=tuple(choices), default=default, help=f"{text} (default {default})")

    size = f"picture (default: {GPU_SIZE} on a GPU, {CPU_SIZE} on a CPU)"
    engine.add_argument("--size", metavar="WxH", help=size)
    engine.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default auto)")
    choice("--precision", ("auto", *PRECISIONS), "auto", "auto: bf16 on a GPU, fp32 on a CPU")
    choice("--kv-precision", ("auto", *PRECISIONS), "auto", "of ring and sink")
    engine.add_argument("--steps", type=int, default=EngineConfig.steps, metavar="N", help="denoise steps (default 4)")
    choice("--schedule", ("sequential", "diagonal"), "sequential", "of blocks and steps")
    choice("--kv-mode", ("timestep", "clean"), "timestep", "rings by timestep, or one clean ring and one more pass")
    engine.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    choice("--motion-tokens", ("on", "off"), "on", "packed motion latents in the sink")
