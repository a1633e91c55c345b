"""Which device and dtype an engine runs on."""

from __future__ import annotations

import torch

from ..errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    return device


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The network's dtype: "auto" is bf16 on a GPU and fp32 on a CPU."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return _DTYPES[precision]
