"""Tensors in checkpoint files: headers first, data tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from .staging import Extent, staged

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Safetensors' names of the dtypes that weights have."""
_MAX_LISTED = 20
_HOST_PIECE, _DEVICE_PIECE = 1 << 18, 1 << 23
"""Values worked on at a time: float32 copies stay in a CPU's cache; a GPU has enough to do."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor.

    Attributes:
        shape: as stored.
        dtype: by the file format's name.
        shard: the file that holds it.
        start: of its bytes in a safetensors file.
    """

    shape: tuple[int, ...]
    dtype: str
    shard: Path
    start: int = 0


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

    def __iter__(self) -> Generator[tuple[str, Tensor]]:
        """Every tensor in host memory, memory-mapped, shard by shard as they lie; one shard is open at a time."""
        for shard in sorted({info.shard for info in self.tensors.values()}):
            with _open(shard) as file:
                for name in [name for name in self.in_order() if self.tensors[name].shard == shard]:
                    try:
                        yield name, file.get_tensor(name)
                    except SafetensorError as error:
                        raise CheckpointError(f"{shard}: tensor {name} cannot be read: {error}") from error

    def in_order(self) -> list[str]:
        """The tensors' names, shard by shard as they lie: the order in which they are read."""
        return sorted(self.tensors, key=lambda name: (self.tensors[name].shard, self.tensors[name].start))

    def read(self, device: torch.device) -> Generator[tuple[str, Tensor]]:
        """Every tensor on `device`, in order: memory-mapped on a CPU, elsewhere read ahead through locked buffers.

        Close the iterator if it is left early: nothing runs on after that.

        Raises:
            CheckpointError: a dtype that no weight has, or a file that has changed or cannot be read.
        """
        return self.__iter__() if device.type == "cpu" else staged(map(self._extent, self.in_order()), device)

    def _extent(self, name: str) -> Extent:
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{info.shard}: tensor {name} is {info.dtype}; expected one of {', '.join(DTYPES)}")
        return Extent(name, info.shard, info.start, info.shape, DTYPES[info.dtype])

    def _read_header(self, shard: Path) -> None:
        with _open(shard) as file:
            self.metadata.update(file.metadata() or {})
            starts = _starts(shard)
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                if name in self.tensors:
                    raise CheckpointError(f"{shard}: tensor {name} also stands in {self.tensors[name].shard.name}")
                view = file.get_slice(name)
                self.tensors[name] = TensorInfo(tuple(view.get_shape()), view.get_dtype(), shard, starts[name])


def _starts(shard: Path) -> dict[str, int]:
    """Where tensors start in a safetensors file that has been checked; its library does not tell."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    first = 8 + length
    return {name: first + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


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


def row_pieces(tensor: Tensor) -> Iterator[slice]:
    """Rows of a tensor, a moderate number at a time: what is computed from a piece needs little memory."""
    values = _HOST_PIECE if tensor.device.type == "cpu" else _DEVICE_PIECE
    count = len(tensor) if tensor.ndim else 0
    step = max(1, values * count // max(1, tensor.numel()))
    return (slice(first, min(first + step, count)) for first in range(0, count, step))
