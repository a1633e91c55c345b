"""Writing checkpoints: a folder that appears when it is complete, and safetensors files filled in any order."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import torch
from torch import Tensor

from ..errors import OutputError
from .layout import NETWORK
from .tensors import DTYPES

Progress = Callable[[str, int, int], None]
"""Called with the file being written and the bytes written and to be written, of the whole checkpoint."""

SMALL_FILES = 1 << 21
"""Bytes set aside for headers, settings and the tokenizer."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


Tensors = dict[str, TensorSpec]


@contextmanager
def new_folder(folder: Path, needed: int) -> Iterator[Path]:
    """A hidden folder beside `folder`, which is given that name when the body has filled it.

    Nothing is left behind when the body fails or is interrupted.

    Args:
        folder: does not exist yet, or is empty; its parent exists.
        needed: bytes that the body will write.

    Raises:
        OutputError: `folder` cannot be written, is not empty, or the disk has too little room.
    """
    target = folder.resolve()
    try:
        _check_target(target, needed)
        part = _hidden_sibling(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be created ({error.strerror})") from error
    try:
        yield part
        part.replace(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error}); nothing is left of it") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_target(target: Path, needed: int) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "is not empty" if target.is_dir() else "is a file"
        raise OutputError(f"{target}: {what}; a checkpoint goes to a new or empty folder")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: no permission to write to {target.parent}")
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OutputError(f"{target}: needs {needed / 1e9:.3f} GB, the disk has {free / 1e9:.3f} GB free")


def _hidden_sibling(target: Path) -> Path:
    part = target.with_name(f".{target.name}.part")
    try:
        part.mkdir()
    except FileExistsError:
        raise OutputError(f"{part}: left by a run that was killed, or by one still going on; delete it first") from None
    return part


class TensorFile:
    """A safetensors file that is being written: a header with every tensor's place, and then the tensors.

    Those of wide dtypes come first, so that every tensor is aligned.
    """

    def __init__(self, path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self.order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
        ends = 0
        for name in self.order:
            spec = tensors[name]
            start, ends = ends, ends + spec.bytes
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, ends]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._path, self._text = path, len(text).to_bytes(8, "little") + text
        self._starts: dict[str, int] = {}
        position = len(self._text)
        for name in self.order:
            self._starts[name] = position
            position += tensors[name].bytes

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        self._file.write(self._text)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def at(self, name: str) -> BinaryIO:
        """The file, positioned where a tensor's bytes go."""
        self._file.seek(self._starts[name])
        return self._file

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the shape and dtype that the header states."""
        self.at(name).write(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)


def network_files(tensors: Tensors, limit: int) -> dict[str, Tensors]:
    """Files of a network: as many tensors in each as `limit` bytes allow, or a single larger one."""
    shards: list[Tensors] = [{}]
    room = limit
    for name, spec in tensors.items():
        if spec.bytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = spec
        room -= spec.bytes
    if len(shards) == 1:
        return {f"{NETWORK}.safetensors": shards[0]}
    count = len(shards)
    return {f"{NETWORK}-{i:05}-of-{count:05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_index(folder: Path, files: Mapping[str, Tensors]) -> None:
    """Write the index of a network's files, where there are several."""
    if len(files) < 2:
        return
    size = sum(spec.bytes for tensors in files.values() for spec in tensors.values())
    places = {name: file for file, tensors in files.items() for name in tensors}
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, indent=2)
    (folder / f"{NETWORK}.safetensors.index.json").write_text(text, encoding="utf-8")
