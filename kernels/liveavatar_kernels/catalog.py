"""Every op: what it is called with, what can compute it on this machine, and its kernels as they are compiled."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .aot import KernelSpec
from .dispatch import Op
from .model_sizes import WAN_14B, ModelSizes

OPS = (
    "ring_write",
    "ring_attention",
    "cross_attention",
    "modulated_norm",
    "fp8_quantize",
    "fp8_linear",
    "causal_conv3d",
    "channel_norm",
)
"""Names of the ops, each a package with a function of that name."""
_KERNEL_MODULES = ("kernel", "gluon")


@dataclass(frozen=True)
class Entry:
    """An op.

    Attributes:
        name: also that of its package and function.
        signature: of the function.
        implementations: why each cannot run on the device that was asked about; None where it can. In the order in
            which the op prefers them.
        automatic: the implementations that the op takes unasked there, the first that does not refuse a call.
        kernels: its Triton and Gluon kernels as they are launched at the model's sizes; empty without Triton.
    """

    name: str
    signature: str
    implementations: Mapping[str, str | None]
    automatic: tuple[str, ...]
    kernels: tuple[KernelSpec, ...]


def catalog(device: torch.device | None = None, capability: int = 90, sizes: ModelSizes = WAN_14B) -> tuple[Entry, ...]:
    """All ops.

    Args:
        device: whose implementations are looked for; None: the first GPU, else the CPU.
        capability: of the GPU that kernels are compiled for, 90 for sm_90.
        sizes: that kernels are compiled for.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return tuple(_entry(name, device, capability, sizes) for name in OPS)


def _entry(name: str, device: torch.device, capability: int, sizes: ModelSizes) -> Entry:
    package = importlib.import_module(f"{__package__}.{name}")
    op: Op = package.OP
    reasons = {implementation.name: implementation.absent(device) for implementation in op.implementations}
    automatic = (i.name for i in op.implementations if device.type in i.automatic and reasons[i.name] is None)
    signature = f"{name}{inspect.signature(getattr(package, name))}"
    return Entry(name, signature, reasons, tuple(automatic), kernel_specs(name, capability, sizes))


def kernel_specs(name: str, capability: int, sizes: ModelSizes = WAN_14B) -> tuple[KernelSpec, ...]:
    """Kernels of the op `name` on sm_`capability`; empty without Triton."""
    if importlib.util.find_spec("triton") is None:
        return ()
    specs: list[KernelSpec] = []
    for module in _KERNEL_MODULES:
        path = f"{__package__}.{name}.{module}"
        if importlib.util.find_spec(path) is not None:
            specs += importlib.import_module(path).aot_specs(sizes, capability)
    return tuple(specs)
