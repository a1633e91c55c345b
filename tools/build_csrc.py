"""Compile csrc/ into one extension module: what setup.py needs for it, without setuptools.

Every source is compiled by nvcc, which hands `.cpp` files to the host compiler. CUTLASS and pybind11 are packages that
need only lie where the running interpreter would import them from: they are found, not imported.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = ("pybind11>=2.13", "ninja>=1.11", "nvidia-cutlass>=4.2,<5")
NVCC_SINCE = (12, 0)
"""The first that knows sm_90a; the one tested is 13.0."""

_ARCHITECTURE = "-gencode=arch=compute_90a,code=sm_90a"
_COMPILE = (
    *("-O3", "-std=c++17", "-DNDEBUG", "--expt-relaxed-constexpr"),
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)
_LINK = ("-shared", "--cudart=static", "-Xlinker=--exclude-libs,ALL")
_GIB_PER_JOB = 5
"""What compiling one CUTLASS kernel takes at its worst (3.6), and some more."""


class ToolkitMissingError(Exception):
    """Something that is needed to compile csrc/ is not there; the message says what."""


@dataclass(frozen=True)
class Toolkit:
    """What csrc/ is compiled with: the compiler, and the folders of headers."""

    nvcc: Path
    cutlass: Path
    pybind11: Path

    @classmethod
    def find(cls, environment: Mapping[str, str]) -> Toolkit:
        """The toolkit of an environment and of the running interpreter.

        Raises:
            ToolkitMissingError: nvcc, CUTLASS or pybind11 is not there, or nvcc is too old.
        """
        if not sys.platform.startswith("linux"):
            raise ToolkitMissingError(f"csrc/ is compiled on Linux, not on {sys.platform}")
        return cls(
            _find_nvcc(environment),
            _find_headers("cutlass_library", "source/include", "cutlass/cutlass.h", "nvidia-cutlass"),
            _find_headers("pybind11", "include", "pybind11/pybind11.h", "pybind11"),
        )


@dataclass(frozen=True)
class Step:
    """One run of nvcc."""

    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path


def steps(toolkit: Toolkit, csrc: Path, build: Path, module: Path) -> list[Step]:
    """Compile each source of `csrc` to an object below `build`, then link them to `module`."""
    sources = sorted(path for suffix in ("cpp", "cu") for path in csrc.rglob(f"*.{suffix}"))
    includes = [f"-I{csrc}"]
    utilities = toolkit.cutlass.parent / "tools" / "util" / "include"  # which CUTLASS's convolutions include
    for headers in (toolkit.cutlass, utilities, toolkit.pybind11, Path(sysconfig.get_path("include"))):
        includes += ["-isystem", str(headers)]
    nvcc = (str(toolkit.nvcc), _ARCHITECTURE)
    compiled = []
    for source in sources:
        target = build / source.relative_to(csrc).with_suffix(f"{source.suffix}.o")
        files = ("-MD", "-MF", f"{target}.d", "-c", str(source), "-o", str(target))
        compiled.append(Step((*nvcc, *_COMPILE, *includes, *files), (source,), target))
    objects = tuple(step.output for step in compiled)
    link = Step((*nvcc, *_LINK, *map(str, objects), "-o", str(module)), objects, module)
    return [*compiled, link]


def run(todo: Iterable[Step], build: Path, jobs: int | None = None) -> None:
    """Run the steps: with ninja those that are out of date, side by side; without it all of them, one by one.

    Raises:
        subprocess.CalledProcessError: a step failed; the compiler has said why.
    """
    todo = list(todo)
    for step in todo:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    ninja = _find_ninja()
    if ninja is None:
        for step in todo:
            subprocess.run(step.command, check=True)
        return
    build.mkdir(parents=True, exist_ok=True)
    (build / "build.ninja").write_text(ninja_file(todo), encoding="utf-8")
    subprocess.run([*ninja, "-C", str(build), "-j", str(jobs or _jobs())], check=True)


def ninja_file(todo: Iterable[Step]) -> str:
    """The steps as ninja reads them."""
    lines = ["rule nvcc", "  command = $nvcc", "  depfile = $out.d", "  deps = gcc", "  description = nvcc $out"]
    lines += ["rule link", "  command = $nvcc", "  description = nvcc $out"]
    for step in todo:
        rule = "nvcc" if "-MD" in step.command else "link"
        inputs = " ".join(map(_ninja_path, step.inputs))
        lines += [f"build {_ninja_path(step.output)}: {rule} {inputs}"]
        lines += ["  nvcc = " + shlex.join(step.command).replace("$", "$$")]
    return "\n".join(lines) + "\n"


def _ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _find_ninja() -> list[str] | None:
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    ninja = shutil.which("ninja")
    return None if ninja is None else [ninja]


def _jobs() -> int:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    return max(1, min(os.cpu_count() or 1, gib // _GIB_PER_JOB))


def _find_nvcc(environment: Mapping[str, str]) -> Path:
    homes = [environment[name] for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    folders = [os.path.join(home, "bin") for home in homes] + [environment.get("PATH", "")]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    if found is None:
        raise ToolkitMissingError("nvcc was not found in CUDA_HOME, CUDA_PATH or PATH")
    answer = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", answer)
    if release is None:
        raise ToolkitMissingError(f"{found} does not work: it cannot tell its version")
    if (int(release[1]), int(release[2])) < NVCC_SINCE:
        raise ToolkitMissingError(f"{found} is {release[1]}.{release[2]}, older than {NVCC_SINCE[0]}.{NVCC_SINCE[1]}")
    return Path(found)


def _find_headers(package: str, folder: str, header: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(package)
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location) / folder / header).is_file():
            return Path(location) / folder
    raise ToolkitMissingError(f"{header} was not found (PyPI: {distribution})")
