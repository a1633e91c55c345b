"""Kernels at the 14B model's sizes on this machine's GPU: first whether they are right, then how fast they are.

python -m bench.kernels                                        everything; eight minutes at most on an H200
python -m bench.kernels --quick                                the larger picture size alone, fewer repeats
python -m bench.kernels --op ring_attention --json out.json    one op, all numbers to a file
python -m bench.kernels --op fp8_linear --choose               write what was fastest to fp8_linear/choices.json
python -m bench.kernels --filter "3375 tokens" --implementations triton,cudnn

Times are of calls in CUDA graphs, over random inputs that do not fit in the cache. What computes something wrong gets
no time, and the command ends with 1. Nothing is measured without a CUDA device (2): neither a CPU nor Triton's
interpreter says anything about a kernel's speed.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from liveavatar_kernels.model_sizes import WAN_14B
from rich.console import Console

from bench.kernel_bench import choose, report, targets
from bench.kernel_bench.rows import Row, as_json, failures, limits_of, with_ratios, write_atomically
from bench.kernel_bench.runner import Conditions, run_case
from bench.kernel_bench.subjects import SUBJECTS, Subject
from bench.kernel_bench.timing import CudaClock, cache_bytes, measure_ceilings

NO_DEVICE = (
    "bench.kernels needs a CUDA device (sm_80 or newer) and a torch that sees it; times of a CPU or of Triton's "
    "interpreter are never reported as performance"
)
_REPEATS, _QUICK_REPEATS = 50, 20
_WIDTH = 200
"""Columns of the report where it does not go to a terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    progress = Console(stderr=True, soft_wrap=True, highlight=False)
    if not torch.cuda.is_available():
        progress.print(NO_DEVICE, markup=False)
        return 2
    started = time.perf_counter()
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    environment = _environment(device, options.commit)
    clock, repeats = CudaClock(), _QUICK_REPEATS if options.quick else _REPEATS
    ceilings = measure_ceilings(device, clock, repeats)
    progress.print(
        f"{environment['device']}: a copy moves {ceilings.copy_gbps:,.0f} GB/s, a bf16 product does "
        f"{ceilings.matmul_tflops:,.0f} TFLOP/s"
    )
    conditions = Conditions(
        device,
        clock,
        repeats,
        cache_bytes(device),
        limits_of(environment["device"]),
        ceilings,
        tuple(options.implementations),
        seed=options.seed,
    )
    rows: list[Row] = []
    cases = selected(options.op, options.filter, options.quick)
    for number, (subject, case) in enumerate(cases, start=1):
        found = run_case(subject, case, conditions)
        rows = with_ratios([*rows, *found])
        torch.cuda.empty_cache()
        environment |= {"seconds": round(time.perf_counter() - started, 1), "cases": f"{number} of {len(cases)}"}
        if options.json is not None:  # now, for the machine may be gone before the last case
            write_atomically(options.json, as_json(environment, ceilings, rows, targets.judge(rows, WAN_14B)))
        seconds = f"{environment['seconds']:.0f} s"
        progress.print(
            f"[{number}/{len(cases)}, {seconds}] {report.line(subject.name, case.name, found)}", markup=False
        )
    if not cases:
        progress.print("no case has such a name", markup=False, style="red")
        return 2
    _show(rows, targets.judge(rows, WAN_14B), environment)
    code = 0
    if options.choose:
        code = _choose(rows, environment, progress)
    for sentence in failures(rows):
        progress.print(f"NOT RIGHT: {sentence}", markup=False, style="red")
        code = 1
    return code


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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = sorted({subject.op.name for subject in SUBJECTS})
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", default=[], choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose op and name contain it")
    parser.add_argument(
        "--implementations", type=_names, default=[], metavar="A,B", help="only these, such as triton,cudnn"
    )
    parser.add_argument("--quick", action="store_true", help="one picture size, fewer repeats: under two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows and the conditions there")
    parser.add_argument("--choose", action="store_true", help="write fp8_linear/choices.json from what was measured")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default %(default)s)")
    parser.add_argument("--commit", help="of this code, where it lies in no repository")
    options = parser.parse_args(arguments)
    if options.choose and options.quick:
        parser.error("--choose needs every picture size: leave out --quick")
    return options


def _names(text: str) -> list[str]:
    known = {implementation.name for subject in SUBJECTS for implementation in subject.op.implementations}
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no implementation {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return names


def _environment(device: torch.device, commit: str | None) -> dict[str, Any]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "command": " ".join(["python -m bench.kernels", *sys.argv[1:]]),
        "commit": commit or _commit(),
        "device": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str:
    """Of the checkout, with "-dirty" where tracked files differ from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit


def _show(rows: Sequence[Row], verdicts: Sequence[targets.Verdict], environment: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(report.table(rows))
    console.print(report.not_run(rows))
    console.print(report.target_table(verdicts))
    console.print(
        f"Commit {environment['commit']}; {environment['device']}; torch {environment['torch']}, "
        f"Triton {environment['triton']}, CUDA {environment['cuda']}; `{environment['command']}`; "
        f"{environment['seconds']} s.",
        markup=False,
        soft_wrap=True,
    )


def _choose(rows: Sequence[Row], environment: dict[str, Any], progress: Console) -> int:
    chosen = choose.choose(rows, WAN_14B, *(environment[name] for name in ("device", "commit", "command")))
    try:
        write_atomically(choose.PATH, choose.updated(choose.PATH.read_text(encoding="utf-8"), chosen))
    except ValueError as error:
        progress.print(f"nothing was chosen: {error}", markup=False, style="red")
        return 1
    progress.print(f"{len(chosen)} choices written to {choose.PATH}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
