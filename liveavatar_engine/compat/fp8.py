"""The FP8 switch that the reference's scripts apply to `noise_model`: `liveavatar.utils.fp8_linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import ConfigError
from ..model import Network
from ..model.linear import Fp8Linear
from ..model.quantize import use_fp8
from .noise_model import NoiseModel


def replace_linear_with_scaled_fp8(
    module: NoiseModel | nn.Module, ignore_keys: Sequence[str] = (), quantize_weight: bool = True
) -> None:
    """Let linear layers compute in e4m3, but for those whose names contain one of `ignore_keys`.

    Scales are per output channel and per token, where the reference has one per tensor: closer to bf16. With
    `quantize_weight` False, the reference quantises weights anew in every call, to the same values; here they are
    quantised once either way.

    Raises:
        ConfigError: the module is no network of this package, an entry of `ignore_keys` is part of no layer's name, or
            the network is in use already.
    """
    if isinstance(module, NoiseModel):
        module.use_fp8(ignore_keys)
    elif isinstance(module, Network):
        _quantize(module, ignore_keys)
    else:
        raise ConfigError(
            f"expected a pipeline's noise_model or a CausalWanModel_S2V of liveavatar_engine.compat, not a "
            f"{type(module).__name__}"
        )


@torch.no_grad()
def _quantize(network: Network, ignore_keys: Sequence[str]) -> None:
    """Replace layers of a network that has its weights, one by one."""
    before = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    for name, place in use_fp8(network, ignore_keys).items():
        layer, linear = network.get_submodule(place.layer), before.pop(name)
        assert isinstance(layer, Fp8Linear)
        layer.quantize(place.first, linear.weight)
        if layer.bias is not None:
            assert linear.bias is not None
            layer.bias[place.rows] = linear.bias
