"""Refusing what will not fit, before anything is allocated."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ..config import EngineConfig, ModelConfig, StreamGeometry
from ..config.engine import OFFLOADABLE
from ..config.size import MIN_SIDE, Size
from ..errors import DeviceMemoryError, InputError
from .layout import AUDIO_ENCODER, Checkpoint
from .memory import MemoryEstimate, PartSizes, Shapes, Share, gigabytes, predict_memory, stream_geometry
from .tensors import TensorStore, read_pickle

_MEMINFO = Path("/proc/meminfo")


def require_memory(found: Checkpoint, config: EngineConfig, device: torch.device, share: Share | None = None) -> None:
    """Compare what an engine of this checkpoint and configuration needs with what is free; only headers are read.

    On a CPU, and for weights that stay in host memory, that is what the system calls available, where it tells. With a
    `share`, what one of its processes needs.

    Raises:
        DeviceMemoryError: it will not fit; the error holds the table of `predict_memory`, and what would help.
        CheckpointError: a file is damaged.
        ConfigError: the size or the precision is not possible.
    """
    geometry = expected_geometry(ModelConfig.from_file(found.config), config)
    require_room(geometry, part_sizes(found), config, device, share)


def require_room(
    geometry: StreamGeometry, parts: PartSizes, config: EngineConfig, device: torch.device, share: Share | None = None
) -> None:
    """`require_memory` for parts of these sizes, wherever they come from.

    Raises:
        DeviceMemoryError, ConfigError: see there.
    """
    estimate = predict_memory(geometry, parts, config, device, share)
    free = free_memory(device)
    if free is not None and estimate.total > free:
        what = "the encoders need" if share is not None and not (share.denoises or share.decodes) else "this needs"
        raise DeviceMemoryError(
            f"{device}: {what} {gigabytes(estimate.total)} of memory, {gigabytes(free)} are free\n"
            f"{_explained(estimate, geometry, parts, config, device, share)}"
        )
    available = available_memory()
    if available is not None and estimate.host > available:
        raise DeviceMemoryError(
            f"host: offloaded weights need {gigabytes(estimate.host)} of memory, {gigabytes(available)} are available\n"
            f"{estimate.table()}\nwhat would help: offload less of {', '.join(config.offload)}"
        )


def expected_geometry(model: ModelConfig, config: EngineConfig) -> StreamGeometry:
    """The streams that are expected; an area that is too small for a 16:9 picture still shows a square one."""
    try:
        return stream_geometry(model, config)
    except InputError:
        return stream_geometry(model, config, Size(MIN_SIDE, MIN_SIDE, exact=True))


def part_sizes(found: Checkpoint) -> PartSizes:
    """Sizes of the parts around a checkpoint's network, from its files' headers.

    Raises:
        CheckpointError: a file is damaged.
    """
    audio = found.root / AUDIO_ENCODER / "model.safetensors"
    stored: Shapes
    if audio.is_file():
        stored = {name: info.shape for name, info in TensorStore([audio]).tensors.items()}
    else:
        stored = _shapes(audio.with_name("pytorch_model.bin"))
    return PartSizes.of(_shapes(found.vae), _shapes(found.text_encoder), stored)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device, if the system tells; those that torch holds in reserve are free too."""
    if device.type != "cuda":
        return available_memory()
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def available_memory() -> int | None:
    """Bytes of host memory that can be had without swapping, where /proc/meminfo tells."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if match is None else int(match[1]) * 1024


def _shapes(path: Path) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in read_pickle(path).items()}


def _explained(
    estimate: MemoryEstimate,
    geometry: StreamGeometry,
    parts: PartSizes,
    config: EngineConfig,
    device: torch.device,
    share: Share | None,
) -> str:
    """The table, and what would help, with what each thing would save."""
    hints = []
    for hint, changed in _lighter(config, device, one=share is None):
        saved = estimate.total - predict_memory(geometry, parts, changed, device, share).total
        if saved > 0:
            hints.append(f"{hint} ({gigabytes(saved)} less)")
    return f"{estimate.table()}\nwhat would help: {', '.join([*hints, 'a smaller size'])}"


def _lighter(config: EngineConfig, device: torch.device, *, one: bool) -> Iterator[tuple[str, EngineConfig]]:
    """Configurations that need less memory, each with what is changed; sessions count where `one` process has all."""
    if config.kv_precision != "fp8":
        yield "kv_precision fp8", dataclasses.replace(config, kv_precision="fp8")
    if config.precision != "fp8":
        kept = config.kv_precision if config.kv_precision == "fp8" else "auto"
        yield "precision fp8", dataclasses.replace(config, precision="fp8", kv_precision=kept)
    for part in OFFLOADABLE if device.type == "cuda" else ():
        if part not in config.offload:
            yield f"offload {part}", dataclasses.replace(config, offload=(*config.offload, part))
    if one and config.max_sessions > 1:
        fewer = config.max_sessions - 1
        yield f"{fewer} session{'s' * (fewer > 1)}", dataclasses.replace(config, max_sessions=fewer)
