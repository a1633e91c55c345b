"""What the gate builds: bytecode of the packages, and csrc/ where a CUDA toolkit and its headers are.

python -m bench.build             bytecode
python -m bench.build --csrc      csrc/ too; what is missing for it is said, and is no failure

Needs no setuptools: a GPU machine may have torch and little else.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parents[1]
PACKAGES = ("liveavatar_engine", "kernels/liveavatar_kernels", "bench", "tests/gpu")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csrc", action="store_true", help="compile csrc/ where a toolkit is")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False)
    if not all(compileall.compile_dir(ROOT / package, quiet=1) for package in PACKAGES):
        return 1
    console.print(f"compiled to bytecode: {', '.join(PACKAGES)}")
    return _csrc(console) if options.csrc else 0


def _csrc(console: Console) -> int:
    sys.path.insert(0, str(ROOT / "tools"))
    build_csrc: Any = importlib.import_module("build_csrc")
    try:
        toolkit = build_csrc.Toolkit.find(os.environ)
    except build_csrc.ToolkitMissingError as missing:
        console.print(f"csrc/ not built: {missing}", markup=False)
        return 0
    build = ROOT / "build" / "csrc"
    module = ROOT / "kernels" / "liveavatar_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        build_csrc.run(build_csrc.steps(toolkit, ROOT / "csrc", build, module), build)
    except subprocess.CalledProcessError as error:
        console.print(f"csrc/ did not compile: exit status {error.returncode}, see above", style="red")
        return 1
    console.print(f"csrc/ built: {module}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
