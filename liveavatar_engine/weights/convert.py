"""Checkpoints whose network needs no more work when it is loaded: an adapter merged, linear layers in e4m3."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from liveavatar_kernels.e4m3 import E4M3
from torch import Tensor

from ..config import ModelConfig
from ..config.engine import REFERENCE_FP8_SKIP
from ..errors import CheckpointError, ConfigError, OutputError
from ..model.linear import Fp8Linear
from ..model.quantize import linears_to_quantize
from .conversion import NOTE, PRECISIONS, Conversion, MergedLora
from .layout import AUDIO_ENCODER, CONFIG, NETWORK, TEXT_ENCODER, TOKENIZER, VAE, Checkpoint
from .lora import LoraAdapter, pieces_of
from .network import NetworkBuilder, check_network, empty_network
from .tensors import TensorStore
from .writing import SMALL_FILES, Progress, TensorFile, Tensors, TensorSpec, network_files, new_folder, write_index

_log = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9
_CPU = torch.device("cpu")
_COPIED = 1 << 24
"""Bytes copied at a time."""


def convert_checkpoint(
    source: Path,
    target: Path,
    *,
    lora: Path | None = None,
    precision: str = "fp8",
    fp8_skip: tuple[str, ...] | None = None,
    shard_bytes: int = SHARD_BYTES,
    link: bool = False,
    device: torch.device = _CPU,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint that loads without any work on its network, to the same bits as `source` with these settings.

    Tensors are read, merged, quantised and written one by one. Nothing is left behind when that fails or is
    interrupted: everything goes to a hidden folder beside `target`, renamed at the end.

    Args:
        source: an original checkpoint.
        target: does not exist yet, or is empty; its parent exists.
        lora: an adapter to merge.
        precision: "fp8", or "bf16" for all layers.
        fp8_skip: parts of the names of linear layers that stay out of e4m3; None: the reference's list.
        shard_bytes: most bytes of tensors in a file of the network, unless one tensor is larger.
        link: hard-link the parts around the network instead of copying them.
        device: that merges and quantises.
        progress: called now and then.

    Raises:
        CheckpointError: `source` is incomplete, damaged or converted already, or the adapter does not fit.
        ConfigError: settings that contradict each other, or an entry of `fp8_skip` that is part of no layer's name.
        OutputError: `target` cannot be written, is not empty, or the disk has too little room.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision != "fp8" and fp8_skip is not None:
        raise ConfigError(f"fp8_skip has no meaning with precision {precision}")
    if shard_bytes < 1:
        raise ConfigError(f"shard size: expected at least one byte, not {shard_bytes}")
    found = Checkpoint(source)
    if (before := Conversion.of(source)) is not None:
        raise CheckpointError(f"{source}: {before}; convert the original instead")
    network = _ConvertedNetwork(source, lora, REFERENCE_FP8_SKIP if fp8_skip is None else fp8_skip, precision, device)
    files = network_files(network.specs(), shard_bytes)
    parts = {path: path.stat().st_size for path in _other_parts(found)}
    copied = 0 if link else sum(parts.values())
    total = sum(spec.bytes for tensors in files.values() for spec in tensors.values()) + copied
    with new_folder(target, total + SMALL_FILES) as folder:
        meter = _Meter(total, progress)
        for path in parts:
            place = folder / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if link:
                _link(path, place)
            else:
                _copy(path, place, meter)
        conversion = network.conversion()
        settings = json.loads(found.config.read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps({**settings, NOTE: conversion.note}, indent=1), encoding="utf-8")
        _write_network(folder, files, network, conversion.metadata, meter)
    _log.info("wrote %s to %s: %s", source, target, conversion)


class _Meter:
    """Reports the bytes that have been written."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._written = total, progress, 0

    def wrote(self, file: str, count: int) -> None:
        self._written += count
        if self._progress is not None:
            self._progress(file, self._written, self._total)


class _ConvertedNetwork:
    """The tensors of a converted network, made one by one."""

    def __init__(
        self, source: Path, lora: Path | None, skip: tuple[str, ...], precision: str, device: torch.device
    ) -> None:
        config = ModelConfig.from_file(source / CONFIG)
        empty = empty_network(config, torch.bfloat16)
        layers = linears_to_quantize(empty, skip) if precision == "fp8" else {}
        self._quantized = {f"{name}.weight" for name in layers}
        self._dtypes = {name: tensor.dtype for name, tensor in empty.state_dict().items()}
        self._skip, self._precision, self._device, self._lora = skip, precision, device, lora
        self._store = TensorStore.of_model(source, NETWORK)
        plain = NetworkBuilder(config, torch.bfloat16, torch.device("meta"))
        check_network(source, self._store, plain, None)
        self._adapter = None if lora is None else LoraAdapter.from_file(lora, plain.shapes)

    def conversion(self) -> Conversion:
        """What is noted down of it."""
        merged = None
        if self._lora is not None and self._adapter is not None:
            with self._lora.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            merged = MergedLora(self._lora.name, digest, self._adapter.scale)
        return Conversion(self._precision, self._skip if self._precision == "fp8" else (), merged)

    def specs(self) -> Tensors:
        """What it consists of, in the order in which it is made."""
        specs: Tensors = {}
        for name in self._store.in_order():
            shape = self._store.tensors[name].shape
            if name in self._quantized:
                specs[name] = TensorSpec(shape, E4M3)
                specs[f"{name}_scale"] = TensorSpec(shape[:1], torch.float32)
            else:
                specs[name] = TensorSpec(shape, self._dtypes[name])
        return specs

    def tensors(self) -> Generator[tuple[str, Tensor]]:
        """Name and values of every tensor."""
        with closing(self._store.read(self._device)) as stored:
            for name, tensor in stored:
                dtype = self._dtypes[name]
                if name in self._quantized:
                    layer = Fp8Linear(tensor.shape[1], tensor.shape[0], False, torch.bfloat16, self._device)
                    for first, rows in pieces_of(name, tensor, self._adapter):
                        layer.quantize(first, rows)
                    yield name, layer.weight
                    yield f"{name}_scale", layer.weight_scale
                elif self._adapter is not None and name in self._adapter.down:
                    yield name, torch.cat([rows.to(dtype) for _, rows in self._adapter.merged(name, tensor)])
                else:
                    yield name, tensor.to(dtype)


def _write_network(
    folder: Path, files: dict[str, Tensors], network: _ConvertedNetwork, metadata: dict[str, str], meter: _Meter
) -> None:
    write_index(folder, files)
    places = {name: file for file, tensors in files.items() for name in tensors}
    with ExitStack() as stack, closing(network.tensors()) as made:
        opened = {
            file: stack.enter_context(TensorFile(folder / file, tensors, metadata)) for file, tensors in files.items()
        }
        for name, tensor in made:
            opened[places[name]].write(name, tensor)
            meter.wrote(places[name], tensor.nbytes)


def _other_parts(found: Checkpoint) -> Iterator[Path]:
    """The files of the parts around the network."""
    yield found.root / VAE
    yield found.root / TEXT_ENCODER
    for folder in (TOKENIZER, AUDIO_ENCODER):
        yield from sorted(path for path in (found.root / folder).rglob("*") if path.is_file())


def _link(path: Path, place: Path) -> None:
    try:
        os.link(path.resolve(), place)
    except OSError as error:
        raise OutputError(
            f"{place.parent}: {path} cannot be hard-linked there ({error.strerror}); leave linking out to copy it"
        ) from error


def _copy(path: Path, place: Path, meter: _Meter) -> None:
    try:
        original = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    with original, place.open("wb") as copy:
        while piece := original.read(_COPIED):
            copy.write(piece)
            meter.wrote(path.name, len(piece))
