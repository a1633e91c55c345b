"""`python -m liveavatar_engine.compat SCRIPT ARGS...`: a script of the reference, as it is, on this engine."""

from __future__ import annotations

import argparse
import os
import runpy
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ..errors import LiveAvatarError
from ..pipeline.tpp.job import Job
from .imports import backend_imports

EXIT_ERROR = 2
_EXAMPLES = """examples:
  python -m liveavatar_engine.compat minimal_inference/s2v_streaming_interact.py --task s2v-14B --size "704*384" ...
  torchrun --nproc_per_node=5 -m liveavatar_engine.compat minimal_inference/gradio_app.py ...

What the script imports from liveavatar.models.wan.causal_s2v_pipeline, ..._tpp and ..._tpp_blockwise is this engine's,
and so is the FP8 switch; all else is the script's own. docs/migration.md goes through its flags.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script; returns the exit code: 0, or 2 for an error of the engine's (one message on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m liveavatar_engine.compat",
        description="Run a script of the reference on this engine, without a change to it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", type=Path, help="the script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    given = parser.parse_args(argv)
    if not given.script.is_file():
        parser.error(f"{given.script}: no such file; expected a script of the reference")
    try:
        run_script(given.script, given.arguments)
    except LiveAvatarError as error:
        sys.stderr.write(f"liveavatar_engine.compat: error: {error}\n")
        return EXIT_ERROR
    return 0


def run_script(script: Path, arguments: Sequence[str]) -> None:
    """Run a script as `python SCRIPT ARGS...` does, with this engine behind its imports.

    Everything that is changed for it is put back at the end.
    """
    with ExitStack() as changed:
        if Job.current() is None:
            changed.enter_context(_environment(_job_of_one()))
        changed.enter_context(_attribute(sys, "argv", [str(script), *arguments]))
        changed.enter_context(_attribute(sys, "path", [str(script.resolve().parent), *sys.path]))
        if not torch.cuda.is_available():
            changed.enter_context(_without_gpu())
        changed.enter_context(backend_imports())
        runpy.run_path(str(script), run_name="__main__")


def _job_of_one() -> dict[str, str]:
    """What torchrun would tell a process that is a job of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@contextmanager
def _without_gpu() -> Iterator[None]:
    """Let a script choose a GPU, wait for it, and set up NCCL, where there is none: nothing, nothing, and gloo."""
    real = distributed.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        real("gloo" if backend == "nccl" else backend, *args, **kwargs)

    def set_device(device: object) -> None:
        """There is none."""

    def synchronize(device: object = None) -> None:
        """Nothing to wait for."""

    replaced: tuple[tuple[Any, str, Callable[..., None]], ...] = (
        (torch.cuda, "set_device", set_device),
        (torch.cuda, "synchronize", synchronize),
        (distributed, "init_process_group", init_process_group),
    )
    with ExitStack() as changed:
        for owner, name, function in replaced:
            changed.enter_context(_attribute(owner, name, function))
        yield


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give something another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment for a while."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
