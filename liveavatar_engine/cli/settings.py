"""Settings of an engine as several commands take them."""

from __future__ import annotations

import re

from ..bench.layout import device_names
from ..config import EngineConfig
from ..config.engine import OFFLOADABLE, REFERENCE_FP8_SKIP
from ..errors import ConfigError

FP8_SKIP_HELP = "parts of names of linear layers to keep out of FP8, or none (default: the reference's list)"

OFFLOAD_HELP = f"parts to keep in host memory: some of {','.join(OFFLOADABLE)}, or none (default text_encoder)"


def fp8_skip(text: str | None) -> tuple[str, ...]:
    """The list that an option names; its default where there is none."""
    if text is None:
        return REFERENCE_FP8_SKIP
    return () if text == "none" else tuple(text.split(","))


def offload(text: str | None) -> tuple[str, ...]:
    """The parts that an option names; its default where there is none."""
    if text is None:
        return EngineConfig.offload
    return () if text == "none" else tuple(text.split(","))


def devices(several: str | None, one: str) -> str | tuple[str, ...]:
    """What --devices names, by rank, or else --device.

    Raises:
        ConfigError: both are given, or --devices names nothing.
    """
    if several is None:
        return one
    if one != "auto":
        raise ConfigError("--device and --devices: give one of them")
    return device_names(several)


def stage_ms(text: str | None) -> tuple[float, float]:
    """Milliseconds of a step and of a block's decode, joined by a comma; the design's where there are none.

    Raises:
        ConfigError: they are something else.
    """
    if text is None:
        return EngineConfig.stage_ms
    try:
        step, decode = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--stage-ms {text!r}: expected two times in ms, such as 110,60") from None
    return step, decode


def byte_count(text: str, option: str) -> int:
    """Bytes of a size such as "5GB", "900 MB", "2GiB" or "12345".

    Raises:
        ConfigError: it is none, or nothing.
    """
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or match[2] not in units or (count := int(float(match[1]) * units[match[2]])) < 1:
        raise ConfigError(f"{option} {text!r}: expected a size such as 5GB or 900MB")
    return count
