"""How an op picks one of its implementations: what the device has, in the op's order, unless one is named."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .environment import Environment

ANYWHERE = ("cuda", "cpu", "meta")
"""Devices that plain PyTorch serves; on meta, ops give shapes only."""
_INTERPRETED_ROWS = 32


class KernelUnavailableError(RuntimeError):
    """An implementation was asked for by name that cannot run here; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: "reference", "triton", "cuda", or that of a library.
        run: takes the custom op's arguments without `implementation`.
        absent: says why it cannot run on a device; None when it can. It finds what is missing, not what is broken:
            a broken kernel raises when it runs.
        automatic: types of device for which an op may pick it unasked.
    """

    name: str
    run: Callable[..., Any]
    absent: Callable[[torch.device], str | None]
    automatic: tuple[str, ...] = ()


@dataclass(frozen=True)
class Op:
    """An op's name and implementations, in the order in which they are preferred."""

    name: str
    implementations: tuple[Implementation, ...]

    def __getitem__(self, name: str) -> Implementation:
        """The implementation of that name.

        Raises:
            ValueError: there is none.
        """
        for implementation in self.implementations:
            if implementation.name == name:
                return implementation
        known = ", ".join(implementation.name for implementation in self.implementations)
        raise ValueError(f"{self.name} has no implementation {name!r}; it has {known}")

    def choose(
        self,
        device: torch.device,
        requested: str | None,
        prefer: Sequence[str] = (),
        refuses: Callable[[str], str | None] = lambda name: None,
    ) -> str:
        """The name of the implementation to run.

        `requested` must be able to run. Without it the first that can is taken: the one that LIVEAVATAR_KERNELS names,
        those of `prefer`, then the op's own order. `refuses` says why an implementation cannot serve this very call.

        Raises:
            ValueError: there is no implementation of that name.
            KernelUnavailableError: the one requested cannot run on the device, or not for this call.
        """
        if requested is not None:
            reason = self[requested].absent(device) or refuses(requested)
            if reason is not None:
                raise KernelUnavailableError(f"{self.name}: {requested!r} cannot run here: {reason}")
            return requested
        family = Environment.read().kernels
        named = [i.name for i in self.implementations if i.name in (family, *prefer)]
        order = sorted(named, key=lambda name: -1 if name == family else list(prefer).index(name))
        order += [i.name for i in self.implementations if device.type in i.automatic]
        for name in order:
            if self[name].absent(device) is None and refuses(name) is None:
                return name
        raise KernelUnavailableError(f"{self.name}: nothing can run this call on {device}")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one, on which kernels are launched; nothing for others."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capability_of(device: torch.device) -> int:
    """90 for sm_90; 0 for a CPU, where kernels run in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors; 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def rows_per_program(block: int, values: int, device: str) -> int:
    """Rows of `block` values that a program takes, on a type of device.

    On a GPU as many as make `values`, one if it is wide. In the interpreter many: there one takes as long.
    """
    return _INTERPRETED_ROWS if device == "cpu" else max(1, values // block)


def never_absent(device: torch.device) -> str | None:
    """For implementations in plain PyTorch."""
    return None


def triton_absent(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device: CUDA devices from sm_80 on, or the CPU in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (8, 0) else f"sm_{capability[0]}{capability[1]}: kernels need sm_80 or newer"
    if device.type == "cpu":
        import triton

        return None if triton.knobs.runtime.interpret else "on a CPU only in the interpreter (TRITON_INTERPRET=1)"
    return f"no kernels for {device.type}"


def triton_e4m3_absent(device: torch.device) -> str | None:
    """Why Triton kernels that use e4m3 cannot run on a device: as `triton_absent`, from sm_89 on."""
    reason = triton_absent(device)
    if reason is None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "e4m3 needs sm_89 or newer"
    return reason


def refuses_e4m3(device: torch.device, quantized: bool) -> Callable[[str], str | None]:
    """For `Op.choose`: Triton refuses calls that involve e4m3 where the device has none."""
    return lambda name: triton_e4m3_absent(device) if quantized and name == "triton" else None
