"""LoRA adapters: W + (alpha / rank) B A, merged in float32 while the weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from .tensors import DTYPES, TensorStore, listed, read_pickle, row_pieces

_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_DEFAULT_SCALE = 0.5
"""alpha / rank of the published adapter (64 / 128), whose file does not state alpha."""


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter checked against the weights it changes.

    Attributes:
        down, up: A [rank, in] and B [out, rank] by the name of the weight they change, memory-mapped.
        scale: alpha / rank.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    scale: float

    @classmethod
    def from_file(cls, path: Path, weights: Mapping[str, tuple[int, ...]], scale: float | None = None) -> LoraAdapter:
        """Read a PEFT adapter, with or without the `base_model.model.` prefix and the `.default` part.

        A file that does not end with `.safetensors` is read as PyTorch's, of plain tensors.

        `scale` is alpha / rank. Without it, alpha is taken from the file's metadata ("alpha"), else the scale is 0.5 as
        for the published adapter.

        Raises:
            CheckpointError: damaged file, or an adapter that does not fit `weights` (name -> shape); every name that
                does not fit is listed.
        """
        tensors, metadata = _read(path)
        sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
        strange = []
        for name, tensor in tensors:
            match = _NAME.fullmatch(name)
            if match is None or tensor.dtype not in DTYPES.values():
                strange.append(name)
            else:
                sides[match["side"]][f"{match['module']}.weight"] = tensor
        if strange or not sides["A"]:
            found = listed(sorted(strange)) if strange else "no tensors at all"
            raise CheckpointError(f"{path}: not a LoRA adapter, found {found} (expected NAME.lora_A.weight, ...lora_B)")
        stated = _scale(path, metadata, sides["A"])
        adapter = cls(sides["A"], sides["B"], stated if scale is None else scale)
        adapter._check(path, weights)
        return adapter

    @property
    def rank(self) -> int:
        """Rows of every A."""
        return next(iter(self.down.values())).shape[0]

    def merged(self, name: str, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Rows of a weight that the adapter changes, merged: float32 [rows, in] behind the first row's number.

        The product is summed in float64 and rounded once, so that it does not depend on who multiplies.
        """
        down, up = (side[name].to(weight.device) for side in (self.down, self.up))
        wide = down.double()
        for rows in row_pieces(weight):
            yield rows.start, weight[rows].float() + self.scale * (up[rows].double() @ wide).float()

    def _check(self, path: Path, weights: Mapping[str, tuple[int, ...]]) -> None:
        complaints = [f"{name} has no counterpart" for name in sorted(set(self.down) ^ set(self.up))]
        for name in sorted(set(self.down) & set(self.up)):
            (rank, columns), (rows, up_rank) = self.down[name].shape, self.up[name].shape
            if name not in weights:
                complaints.append(f"{name} is not a weight of this model")
            elif weights[name] != (rows, columns) or rank != up_rank:
                complaints.append(f"{name}: B {[rows, up_rank]} A {[rank, columns]} do not make {list(weights[name])}")
        if complaints:
            raise CheckpointError(f"{path}: a LoRA for another model: {listed(complaints)}")


def pieces_of(name: str, weight: Tensor, adapter: LoraAdapter | None) -> Iterator[tuple[int, Tensor]]:
    """A weight [rows, ...] in pieces behind the number of their first row, merged where the adapter changes it."""
    if adapter is not None and name in adapter.down:
        return adapter.merged(name, weight)
    return ((rows.start, weight[rows]) for rows in row_pieces(weight))


def _read(path: Path) -> tuple[Iterable[tuple[str, Tensor]], Mapping[str, str]]:
    """Tensors by name, and what is noted of them; PyTorch's files have no notes."""
    if path.suffix != ".safetensors":
        return read_pickle(path).items(), {}
    store = TensorStore([path])
    return store, store.metadata


def _scale(path: Path, metadata: Mapping[str, str], down: Mapping[str, Tensor]) -> float:
    ranks = sorted({tensor.shape[0] for tensor in down.values() if tensor.ndim == 2 and tensor.shape[0]})
    if len(ranks) != 1 or any(tensor.ndim != 2 for tensor in down.values()):
        raise CheckpointError(f"{path}: expected matrices of one rank, found ranks {ranks}")
    if "alpha" not in metadata:
        return _DEFAULT_SCALE
    try:
        return float(metadata["alpha"]) / ranks[0]
    except ValueError:
        raise CheckpointError(f"{path}: metadata alpha={metadata['alpha']!r} is not a number") from None
