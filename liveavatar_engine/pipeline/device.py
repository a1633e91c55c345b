"""Which device and dtype an engine runs on."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from liveavatar_kernels import catalog
from liveavatar_kernels.e4m3 import E4M3
from liveavatar_kernels.environment import Environment

from ..config import EngineConfig
from ..errors import ConfigError

_log = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(names: str | tuple[str, ...]) -> torch.device:
    """The device of a configuration: "auto" is the first GPU, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if isinstance(names, str):
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    (name,) = names
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"device {name!r}: this machine has {count} CUDA devices that torch can use")
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    return torch.device("cpu")


def local_name(name: str) -> str:
    """A device's name on its own node: "cuda:0" of "cuda:0@1"."""
    return name.partition("@")[0]


@dataclass(frozen=True)
class Precision:
    """What a configuration's precisions mean on a device.

    Attributes:
        dtype: of activations and most weights.
        cache: of rings and sinks, `dtype` or e4m3.
        fp8_skip: parts of the names of linear layers that are not in e4m3; None: none is.
        decoder: of the VAE's decoder; its encoder is float32.
    """

    dtype: torch.dtype
    cache: torch.dtype
    fp8_skip: tuple[str, ...] | None
    decoder: torch.dtype


def resolve_precision(config: EngineConfig, device: torch.device) -> Precision:
    """The precisions of a configuration: "auto" is bf16 on a GPU and fp32 on a CPU.

    Raises:
        ConfigError: `kv_precision` does not go with what "auto" has become.
    """
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if config.kv_precision not in ("auto", "fp8") and _DTYPES[config.kv_precision] != dtype:
        raise ConfigError(f"kv_precision {config.kv_precision!r}: precision auto is {precision} on {device}; name one")
    cache = E4M3 if config.kv_precision == "fp8" else dtype
    decoder = dtype if config.vae_precision == "auto" else _DTYPES[config.vae_precision]
    return Precision(dtype, cache, config.fp8_skip if precision == "fp8" else None, decoder)


def preferred_kernels() -> str | None:
    """The kernels that LIVEAVATAR_KERNELS names, or None.

    Raises:
        ConfigError: it has a value that it cannot have.
    """
    try:
        return Environment.read().kernels
    except ValueError as error:
        raise ConfigError(str(error)) from None


def log_kernels(device: torch.device) -> None:
    """Log what will compute each op on a device, and warn where a GPU is left to plain PyTorch.

    Raises:
        ConfigError: LIVEAVATAR_KERNELS has a value that it cannot have.
    """
    preferred = preferred_kernels()
    for entry in catalog(device):
        present = [name for name, reason in entry.implementations.items() if reason is None]
        picked = preferred if preferred in present else " or ".join(entry.automatic)
        _log.info("op %s: %s", entry.name, picked)
        missing = entry.implementations.get("triton")
        if device.type == "cuda" and missing is not None:
            _log.warning("op %s runs in plain PyTorch, slowly: %s", entry.name, missing)


def graphs_absent(device: torch.device) -> str | None:
    """Why denoise steps cannot be captured as CUDA graphs on a device; None: they can.

    Kernels read on the device where a block stands. The plain PyTorch ops read it on the host, which no graph can hold.

    Raises:
        ConfigError: LIVEAVATAR_KERNELS has a value that it cannot have.
    """
    if device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if preferred_kernels() == "reference":
        return "LIVEAVATAR_KERNELS asks for plain PyTorch, which reads on the host where a block stands"
    missing = [entry for entry in catalog(device) if entry.implementations.get("triton") is not None]
    return f"op {missing[0].name} runs in plain PyTorch" if missing else None
