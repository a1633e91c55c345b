"""Look at what the compiler made of csrc/: a line per object file, and status 1 if a kernel is not what it should be.

python csrc/sass_report.py FOLDER      the folder of object files, as `make csrc` leaves it in build/csrc
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TENSOR_CORE = {"causal_conv3d": "HGMMA", "fp8_linear": "QGMMA"}
"""The instruction without which an op's kernels do not run on the tensor cores, by the op's folder."""


@dataclass(frozen=True)
class Kernels:
    """What the machine code of one object file says."""

    name: str
    registers: int
    stack: int
    spills: int
    expected: str | None
    found: int

    @property
    def good(self) -> bool:
        return self.stack == self.spills == 0 and (self.expected is None or self.found > 0)


def read(cuobjdump: str, file: Path) -> Kernels:
    usage, code = (
        subprocess.run([cuobjdump, option, str(file)], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    used = {name: [int(value) for value in re.findall(rf"\b{name}:(\d+)", usage)] for name in ("REG", "STACK", "LOCAL")}
    expected = TENSOR_CORE.get(file.parent.name)
    return Kernels(
        name=f"{file.parent.name}/{file.name.split('.')[0]}",
        registers=max(used["REG"]),
        stack=max(used["STACK"] + used["LOCAL"]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        expected=expected,
        found=len(re.findall(rf"\b{expected}\b", code)) if expected else 0,
    )


def find_cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that Triton carries."""
    spec = importlib.util.find_spec("triton")
    for location in (spec and spec.submodule_search_locations) or ():
        carried = Path(location, "backends", "nvidia", "bin", "cuobjdump")
        if carried.is_file():
            return str(carried)
    return shutil.which("cuobjdump")


def main(folder: Path) -> int:
    files = sorted(folder.rglob("*.cu.o"))
    if not files:
        sys.stderr.write(f"sass_report: there are no object files in {folder}\n")
        return 1
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        sys.stdout.write("The machine code was not looked at: there is no cuobjdump here (CUDA toolkit or triton).\n")
        return 0
    row = "{:<32}{:>10}{:>8}{:>8}  {:<14}{}\n"
    sys.stdout.write(row.format("kernel", "registers", "stack", "spills", "tensor core", ""))
    kernels = [read(cuobjdump, file) for file in files]
    for one in kernels:
        instructions = f"{one.found} {one.expected}" if one.expected else "-"
        verdict = "ok" if one.good else "NOT AS EXPECTED"
        sys.stdout.write(row.format(one.name, one.registers, one.stack, one.spills, instructions, verdict))
    return 0 if all(one.good for one in kernels) else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
