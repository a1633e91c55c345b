"""Running both sides one after the other, and comparing what they computed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ... import errors
from ...errors import ConfigError, InputError
from ...pipeline.device import resolve_precision
from ..settings import Settings
from . import worker
from .checkout import FP8_MODULE, Checkout
from .job import ENGINE, REFERENCE, Job, Measured
from .report import OWN, UNROUNDED, CompareResult, Difference, Side, notes_of
from .sides import LATENTS, VELOCITY
from .sides import UNROUNDED as UNROUNDED_PREFIX

_log = logging.getLogger(__name__)

REFERENCE_PRECISIONS = ("auto", "fp32", "bf16", "fp8")
COMPILE = ("auto", "on", "off")
_COMPILED_WARM_UP = 8
"""Blocks after which torch.compile has seen what changes in a stream: until then it may compile anew."""

Say = Callable[[str], None]


def run_compare(
    reference: Path,
    settings: Settings,
    *,
    reference_precision: str = "auto",
    reference_compile: str = "auto",
    say: Say = lambda text: None,
) -> CompareResult:
    """Run the reference's own network and the engine's, one after the other, on the same weights and inputs.

    Each side runs in a process of its own and finds the device empty. Nothing of the reference is changed on disk.

    Args:
        reference: folder of a checkout of the reference.
        settings: of the engine; model, weights, size, steps, blocks, warm-up, seed and device are also the reference's.
        reference_precision: one of REFERENCE_PRECISIONS; "auto" is the engine's.
        reference_compile: whether the reference uses torch.compile as its scripts do; "auto": on a GPU, and without it
            where that fails, which is noted.
        say: called with what is going on.

    Raises:
        InputError: `reference` is no such folder, or its code fails.
        ConfigError: the settings are none that the reference knows, or memory does not suffice.
        CheckpointError: the settings' weights cannot be used.
    """
    started = time.perf_counter()
    checkout = Checkout.find(reference)
    _check(settings, reference_precision, reference_compile)
    engine_precision = _resolved(settings)
    precision, notes = _precision(
        checkout, settings, engine_precision if reference_precision == "auto" else reference_precision
    )
    compiled = _compiles(settings, reference_compile)
    if compiled:
        settings = replace(settings, warm_up=max(settings.warm_up, _COMPILED_WARM_UP))
    job = Job(REFERENCE, settings, precision, checkout.root, compiled, torch.get_num_threads())
    say(f"the reference, {precision}{', compiled' if compiled else ''}: {checkout.root} ({checkout.version})")
    measured, theirs, compiled = _run_reference(job, reference_compile == "auto", notes, say)
    _check_finite(checkout, theirs[LATENTS])
    say(f"the engine, {engine_precision}")
    own, ours = _run(replace(job, side=ENGINE, compiled=False))
    differences = _differences(ours, theirs)
    return CompareResult(
        settings=settings,
        version=checkout.version,
        reference=Side(precision, "torch.compile" if compiled else "eager", measured, settings.steps),
        engine=Side(engine_precision, _mode(settings), own, settings.steps),
        differences=differences,
        notes=(*notes, *notes_of((engine_precision, precision), differences)),
        seconds=time.perf_counter() - started,
    )


def _run_reference(job: Job, auto: bool, notes: list[str], say: Say) -> tuple[Measured, dict[str, Tensor], bool]:
    """Run the reference's side, once more without torch.compile where that fails; the last value says which it was."""
    if auto and job.settings.device == "cpu":
        notes.append("the reference runs without torch.compile, which its scripts use on a GPU")
    try:
        return *_run(job), job.compiled
    except InputError as error:
        if not (auto and job.compiled):
            raise
        notes.append(f"the reference runs without torch.compile, with which it fails: {error}")
        say(notes[-1])
    return *_run(replace(job, compiled=False)), False


def _check(settings: Settings, reference_precision: str, reference_compile: str) -> None:
    if reference_precision not in REFERENCE_PRECISIONS:
        raise ConfigError(f"reference precision: {reference_precision!r} is none of {', '.join(REFERENCE_PRECISIONS)}")
    if reference_compile not in COMPILE:
        raise ConfigError(f"reference compile: {reference_compile!r} is none of {', '.join(COMPILE)}")
    for name, only in (("schedule", "sequential"), ("kv_mode", "timestep"), ("motion_tokens", True)):
        if getattr(settings, name) != only:
            raise ConfigError(f"compare: the reference has no other {name} than {only!r}")


def _resolved(settings: Settings) -> str:
    """The engine's precision, by name, where the settings may say "auto"."""
    precision = resolve_precision(settings.engine_config(), torch.device(settings.device))
    if precision.fp8_skip is not None:
        return "fp8"
    return "fp32" if precision.dtype == torch.float32 else "bf16"


def _precision(checkout: Checkout, settings: Settings, asked: str) -> tuple[str, list[str]]:
    """The reference's precision, and what there is to say about it."""
    if asked != "fp8":
        return asked, []
    if not checkout.has(FP8_MODULE):
        return "bf16", ["the reference runs in bf16: this version of it has no FP8"]
    if (reason := _without_fp8(torch.device(settings.device))) is not None:
        return "bf16", [f"the reference runs in bf16: its FP8 needs torch._scaled_mm, which fails here: {reason}"]
    return "fp8", []


def _without_fp8(device: torch.device) -> str | None:
    one = torch.ones((), device=device)
    product = torch.ones(16, 16, device=device).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(product, product.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    except (RuntimeError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    return None


def _compiles(settings: Settings, asked: str) -> bool:
    return asked == "on" or (asked == "auto" and settings.device != "cpu")


def _mode(settings: Settings) -> str:
    return "CUDA graphs" if settings.graphs and settings.device != "cpu" else "eager"


def _run(job: Job) -> tuple[Measured, dict[str, Tensor]]:
    """Run one side in a process of its own."""
    paths = [str(Path(entry).resolve()) for entry in sys.path if Path(entry).exists()]
    with tempfile.TemporaryDirectory(prefix="liveavatar-compare-") as name:
        folder = Path(name)
        (folder / worker.JOB).write_text(job.to_json(), encoding="utf-8")
        with (
            (folder / worker.OUTPUT).open("w", encoding="utf-8") as output,
            subprocess.Popen(
                [sys.executable, "-m", worker.__name__, name],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            ) as process,
        ):
            try:
                process.wait()
            finally:
                process.kill()
        if process.returncode:
            raise _failure(job, folder, process.returncode)
        return Measured.from_json((folder / worker.RESULT).read_text(encoding="utf-8")), load_file(
            folder / worker.TENSORS
        )


def _failure(job: Job, folder: Path, code: int) -> Exception:
    """What to raise after a side has failed."""
    _log.info("%s", (folder / worker.OUTPUT).read_text(encoding="utf-8", errors="replace"))
    file = folder / worker.ERROR
    if not file.exists():
        return ConfigError(
            f"compare, {job.side}: its process ended with {code}; if it was killed, memory was too small"
        )
    told = json.loads(file.read_text(encoding="utf-8"))
    if told["kind"] is not None:
        return getattr(errors, told["kind"], errors.LiveAvatarError)(f"compare, {job.side}: {told['message']}")
    if job.side == REFERENCE:
        return InputError(f"--reference {job.checkout}: its code fails in {told['where']}: {told['message']}")
    return RuntimeError(f"compare, {job.side}: {told['where']}: {told['message']}")


def _check_finite(checkout: Checkout, latents: Tensor) -> None:
    finite = latents.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise InputError(f"--reference {checkout.root}: its latents are not finite, first in block {first}")


def _differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[Difference, ...]:
    found = []
    for other, prefix in ((OWN, ""), (UNROUNDED, UNROUNDED_PREFIX)):
        if prefix + LATENTS in theirs:
            velocities, latents = (
                tuple(map(_relative_l2, ours[name], theirs[prefix + name])) for name in (VELOCITY, LATENTS)
            )
            found.append(Difference(other, velocities, latents))
    return tuple(found)


def _relative_l2(ours: Tensor, theirs: Tensor) -> float:
    exact = theirs.double()
    return float((ours.double() - exact).norm() / exact.norm())
