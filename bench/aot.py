"""Compile every Triton kernel ahead of time for named GPUs, and look at what the compiler made of it.

    python -m bench.aot --arch 90 --out bench/results/aot.md

Needs no GPU and no driver; works on whatever Triton is imported, also one that PYTHONPATH names. A kernel that spills
on sm_90, that needs more shared memory than the GPU has, or that should use matrix instructions and does not, makes
the exit code 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liveavatar_kernels.aot import KernelSpec
from liveavatar_kernels.catalog import OPS, kernel_specs
from rich.console import Console
from rich.progress import track

ARCHITECTURES = (80, 89, 90, 100, 120)
SPILL_FREE = (90,)
SHARED_LIMITS = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that one program can have."""
_MATRIX = {
    80: ("HMMA", "HMMA"),
    89: ("HMMA", "QMMA"),
    90: ("HGMMA", "QGMMA"),
    100: ("UTCHMMA", "UTCQMMA"),
    120: ("HMMA", "QMMA"),
}
"""Matrix instructions on bf16 and on e4m3."""
_SHOWN = ("HGMMA", "QGMMA", "HMMA", "QMMA", "UTCHMMA", "UTCQMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDL", "STL")
_OPCODE = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)", re.MULTILINE)


@dataclass(frozen=True)
class Report:
    """What became of a kernel.

    Attributes:
        registers: per thread.
        stack, spills: bytes per thread; spills are stores.
        shared: bytes per program.
        instructions: how many of each kind that is worth knowing.
        complaints: what must not be so.
    """

    kernel: str
    capability: int
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: dict[str, int]
    complaints: tuple[str, ...]

    @property
    def row(self) -> tuple[str, ...]:
        """As a line of the table."""
        instructions = ", ".join(f"{count} {name}" for name, count in self.instructions.items())
        numbers = (self.warps, self.registers, self.stack, self.spills, self.shared)
        return (f"sm_{self.capability}", self.kernel, *map(str, numbers), instructions)


HEADINGS = ("GPU", "kernel", "warps", "registers", "stack", "spills", "shared memory", "instructions")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    import triton

    if triton.knobs.runtime.interpret:
        console.print("TRITON_INTERPRET is set: kernels of the interpreter cannot be compiled", style="red")
        return 2
    tasks = [
        (op, capability, index)
        for capability in options.arch
        for op in options.op
        for index in range(len(kernel_specs(op, capability)))
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        title = f"Triton {triton.__version__}"
        reports = list(track(pool.map(_compile, tasks), title, len(tasks), console=console))
    table = markdown(triton.__version__, options.arch, reports)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table, encoding="utf-8")
    else:
        Console(width=200).print(table, markup=False, highlight=False)
    bad = [f"sm_{r.capability} {r.kernel}: {complaint}" for r in reports for complaint in r.complaints]
    for line in bad:
        console.print(line, style="red", markup=False, soft_wrap=True)
    console.print(f"{len(reports)} kernels compiled, {len(bad)} complaints")
    return 1 if bad else 0


def compile_kernel(spec: KernelSpec, capability: int) -> Any:
    """Compile for sm_`capability`; the result is Triton's."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    position = {name: index for index, name in enumerate(spec.function.arg_names)}
    signature = {name: spec.signature.get(name, "constexpr") for name in position}
    source = (GluonASTSource if spec.gluon else ASTSource)(
        fn=spec.function,
        signature=signature,
        constexprs={(position[name],): value for name, value in spec.constexprs.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in spec.divisible_by_16},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(spec.options))


def inspect_kernel(spec: KernelSpec, capability: int, compiled: Any) -> Report:
    """Read registers and instructions from the machine code, spills from a second run of the assembler."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"], encoding="utf-8")
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _run("cuobjdump", "-res-usage", str(cubin)))
        counts = Counter(_OPCODE.findall(_run("nvdisasm", "-c", str(cubin))))
        notes = _assembler_notes(ptx, compiled.asm["ptx"])
    assert usage is not None
    spilled = re.search(r"(\d+) bytes spill stores", notes)
    report = Report(
        spec.name,
        capability,
        compiled.metadata.num_warps,
        int(usage[1]),
        int(usage[2]),
        int(spilled[1]) if spilled else 0,
        compiled.metadata.shared,
        {name: counts[name] for name in _SHOWN if counts[name]},
        (),
    )
    serialised = "wgmma" in notes and "serializ" in notes
    return _judged(spec, report, serialised)


def _judged(spec: KernelSpec, report: Report, serialised: bool) -> Report:
    complaints = []
    if report.spills and report.capability in SPILL_FREE:
        complaints.append(f"spills {report.spills} bytes")
    if report.shared > SHARED_LIMITS[report.capability]:
        complaints.append(f"{report.shared} bytes of shared memory; {SHARED_LIMITS[report.capability]} are there")
    quantized = any("fp8" in kind for kind in spec.signature.values())
    wanted = _MATRIX[report.capability][quantized]
    if spec.matrix and not report.instructions.get(wanted):
        complaints.append(f"no {wanted}")
    if serialised:
        complaints.append("the assembler serialised its wgmma instructions")
    return Report(**{**vars(report), "complaints": tuple(complaints)})


def _compile(task: tuple[str, int, int]) -> Report:
    op, capability, index = task
    spec = kernel_specs(op, capability)[index]
    return inspect_kernel(spec, capability, compile_kernel(spec, capability))


def _assembler_notes(path: Path, ptx: str) -> str:
    """What ptxas says with -v; of the two that Triton brings, one knows the PTX version."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    said = [
        _run(name, "-v", f"-arch={target[1]}", str(path), "-o", os.devnull) for name in ("ptxas", "ptxas-blackwell")
    ]
    return next(text for text in said if "spill stores" in text)


def _run(tool: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    if not path.exists():
        return ""
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def markdown(version: str, architectures: Iterable[int], reports: Iterable[Report]) -> str:
    """The reports as a page."""
    names = ", ".join(f"sm_{capability}" for capability in architectures)
    lines = [
        f"# Kernels compiled ahead of time: Triton {version}, {names}",
        "",
        "At the sizes of the 14B model; by `make aot`, without a GPU. Stack and spills in bytes per thread, shared",
        "memory in bytes per program. None of this is a speed.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---|" + "---:|" * 5 + "---|",
    ]
    lines += ["| " + " | ".join(report.row) + " |" for report in reports]
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.aot",
        description="Compile the Triton kernels ahead of time and report registers, spills and instructions.",
        epilog="example: python -m bench.aot --arch 90 120 --op ring_attention",
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, metavar="CC")
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the table goes (default: standard output)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
