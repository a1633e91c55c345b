"""Tensors in safetensors shards: headers first, data tensor by tensor, never two shards at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError

_MAX_LISTED = 20


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor, and the shard that holds it."""

    shape: tuple[int, ...]
    dtype: str
    shard: Path


class TensorStore:
    """The tensors of one or several safetensors files; opening it reads headers only.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or a tensor stands in two shards.
    """

    def __init__(self, shards: list[Path]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for shard in shards:
            self._read_header(shard)

    @classmethod
    def of_model(cls, folder: Path, stem: str) -> TensorStore:
        """The store of `stem*.safetensors` in `folder`, through `stem.safetensors.index.json` where that exists."""
        index = folder / f"{stem}.safetensors.index.json"
        if not index.is_file():
            return cls(sorted(folder.glob(f"{stem}*.safetensors")))
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a shard index (a JSON object with a weight_map): {error}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{index}: names shards that are not there: {listed(missing)}")
        store = cls([folder / name for name in names])
        absent = sorted(set(weight_map) - set(store.tensors))
        if absent:
            raise CheckpointError(f"{index}: names tensors that its shards do not hold: {listed(absent)}")
        return store

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, shard by shard; the previous shard is closed before the next is opened."""
        for shard in sorted({info.shard for info in self.tensors.values()}):
            with _open(shard) as file:
                for name in [name for name, info in self.tensors.items() if info.shard == shard]:
                    try:
                        yield name, file.get_tensor(name)
                    except SafetensorError as error:
                        raise CheckpointError(f"{shard}: tensor {name} cannot be read: {error}") from error

    def _read_header(self, shard: Path) -> None:
        with _open(shard) as file:
            self.metadata.update(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                if name in self.tensors:
                    raise CheckpointError(f"{shard}: tensor {name} also stands in {self.tensors[name].shard.name}")
                view = file.get_slice(name)
                self.tensors[name] = TensorInfo(tuple(view.get_shape()), view.get_dtype(), shard)


def _open(path: Path) -> safe_open:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file (expected safetensors)")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, truncated or not a safetensors file: {error}") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.pth` file, memory-mapped; nothing in it can run code.

    Raises:
        CheckpointError: the file is not a pickle of plain tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # torch reports damage in many ways; all of them mean that the file cannot be used
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: not a PyTorch file of plain tensors: damaged, or it holds objects that could run code "
            f"and is refused ({reason})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: expected a dictionary of tensors")
    return state


def check_names_and_shapes(
    source: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare tensors by name and shape.

    Raises:
        CheckpointError: one error that lists what is missing, unexpected and wrongly shaped.
    """
    complaints = []
    if missing := sorted(set(expected) - set(found)):
        complaints.append(f"{len(missing)} missing: {listed(missing)}")
    if unexpected := sorted(set(found) - set(expected)):
        complaints.append(f"{len(unexpected)} unexpected: {listed(unexpected)}")
    wrong = [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(set(expected) & set(found))
        if found[name] != expected[name]
    ]
    if wrong:
        complaints.append(f"{len(wrong)} of another shape: {listed(wrong)}")
    if complaints:
        raise CheckpointError(f"{source}: tensors do not fit the model\n  " + "\n  ".join(complaints))


def listed(names: list[str]) -> str:
    """Names joined for an error message; a very long list is cut and counted."""
    shown = ", ".join(names[:_MAX_LISTED])
    return shown if len(names) <= _MAX_LISTED else f"{shown} and {len(names) - _MAX_LISTED} more"


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` in place of the parameter or buffer `name` of a module made on the meta device."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
