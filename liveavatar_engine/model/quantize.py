"""Which linear layers compute in e4m3, and their replacement in a loaded network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import ConfigError
from .attention import RingSelfAttention
from .linear import Fp8Linear
from .network import Network


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


def quantize_linears(network: Network, skip: Sequence[str]) -> None:
    """Replace linear layers in place, one by one; the query, key and value projections of a layer become one.

    Raises:
        ConfigError: an entry of `skip` is part of no layer's name.
    """
    chosen = linears_to_quantize(network, skip)
    for name, module in list(network.named_modules()):
        if isinstance(module, RingSelfAttention) and all(f"{name}.{part}" in chosen for part in "qkv"):
            module.fuse()
            for part in "qkv":
                del chosen[f"{name}.{part}"]
    for name, layer in chosen.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, Fp8Linear.of(layer))
