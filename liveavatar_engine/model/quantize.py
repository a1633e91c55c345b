"""Which linear layers compute in e4m3, and where a checkpoint's tensors lie in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ConfigError
from .attention import RingSelfAttention
from .linear import Fp8Linear
from .network import Network


@dataclass(frozen=True)
class LayerRows:
    """Rows of a layer in e4m3 that compute one linear layer of a checkpoint.

    Attributes:
        layer: name of the layer in e4m3.
        first, count: rows of its weight, scale and bias.
    """

    layer: str
    first: int
    count: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)


def linears_to_quantize(network: Network, skip: Sequence[str]) -> dict[str, nn.Linear]:
    """Name -> layer of every linear layer whose name contains none of `skip`.

    Raises:
        ConfigError: an entry of `skip` is part of no layer's name.
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    idle = [entry for entry in skip if not any(entry in name for name in layers)]
    if idle:
        raise ConfigError(f"fp8_skip: no linear layer's name contains {', '.join(map(repr, idle))}")
    return {name: layer for name, layer in layers.items() if not any(entry in name for entry in skip)}


def use_fp8(network: Network, skip: Sequence[str]) -> dict[str, LayerRows]:
    """Put empty layers in e4m3 in place of linear layers, on their devices and in their dtypes.

    The query, key and value projections of a self-attention become one layer where none of them is skipped.

    Args:
        network: changed in place.
        skip: parts of the names of linear layers that stay as they are.

    Returns:
        Name of every layer that was replaced -> the rows that compute it now.

    Raises:
        ConfigError: an entry of `skip` is part of no layer's name.
    """
    chosen = linears_to_quantize(network, skip)
    places: dict[str, LayerRows] = {}
    for name, module in list(network.named_modules()):
        if isinstance(module, RingSelfAttention) and all(f"{name}.{part}" in chosen for part in "qkv"):
            module.fuse()
            first = 0
            for part in "qkv":
                rows = chosen.pop(f"{name}.{part}").out_features
                places[f"{name}.{part}"] = LayerRows(f"{name}.qkv", first, rows)
                first += rows
    for name, layer in chosen.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, Fp8Linear.of(layer))
        places[name] = LayerRows(name, 0, layer.out_features)
    return places
