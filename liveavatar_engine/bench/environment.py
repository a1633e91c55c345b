"""Under which conditions something was measured: device, versions, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__

UNKNOWN = "unknown"
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """What must stand beside every figure.

    Attributes:
        command: as it was typed.
        commit: of the checkout, or "unknown".
        dirty: whether tracked files differ from the commit; None where that is unknown.
        device: its name; of a CPU with the threads that torch uses.
        device_kind: "cuda" or "cpu".
        capability: of a GPU, such as [9, 0].
        memory_bytes: of the device, or of the machine for a CPU.
        versions: by package; None for what is not installed.
        date: UTC, ISO 8601.
    """

    command: str
    commit: str
    dirty: bool | None
    device: str
    device_kind: str
    capability: list[int] | None
    memory_bytes: int
    versions: dict[str, str | None]
    date: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def label(self) -> str:
        """Device and versions in one line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version is not None)
        return f"{self.device}; {versions}"


def describe(device: torch.device, command: str, commit: str | None = None) -> Environment:
    """The conditions of a run on `device`; `commit` names the code where it lies in no repository."""
    found, dirty = checkout()
    on_gpu = device.type == "cuda"
    return Environment(
        command=command,
        commit=commit or found,
        dirty=None if commit else dirty,
        device=device_name(device),
        device_kind=device.type,
        capability=list(torch.cuda.get_device_capability(device)) if on_gpu else None,
        memory_bytes=_memory_bytes(device),
        versions={
            "liveavatar-engine": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": _cudnn(),
            "transformers": _version("transformers"),
            "numpy": _version("numpy"),
        },
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def device_name(device: torch.device) -> str:
    """A GPU's name, or the CPU's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({_processor()}), {threads} thread{'s' if threads > 1 else ''}"


def checkout(root: Path = _ROOT) -> tuple[str, bool | None]:
    """Commit of the repository whose root is `root`, and whether its tracked files differ from it.

    An installed package that lies inside somebody's repository has no commit.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if not commit or top is None or Path(top).resolve() != root:
        return UNKNOWN, None
    return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cudnn() -> str | None:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return None if version is None else str(version)


def _processor() -> str:
    """The CPU's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
