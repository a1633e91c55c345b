"""A checkpoint's network, straight to its device and dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from ..config import ModelConfig
from ..model import Network
from .layout import CONFIG, NETWORK
from .lora import LoraAdapter
from .tensors import TensorStore, assign, check_names_and_shapes

_log = logging.getLogger(__name__)

LoadProgress = Callable[[int, int], None]
"""Called with the tensors of the network loaded and to be loaded."""


def empty_network(config: ModelConfig) -> Network:
    """A network without storage, for its names and shapes."""
    with torch.device("meta"):
        return Network(config).eval().requires_grad_(False)


def network_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint's network holds."""
    return {name: tuple(tensor.shape) for name, tensor in empty_network(config).state_dict().items()}


def load_network(
    folder: Path,
    lora: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    progress: LoadProgress | None = None,
) -> Network:
    """Load `config.json` and `diffusion_pytorch_model*.safetensors` of `folder`.

    Names and shapes, also the adapter's, are checked from the headers before anything is allocated; then tensors go
    one by one to the device, merged with the adapter in float32 where it changes them.

    Raises:
        CheckpointError: files are missing or damaged, or tensors do not fit.
    """
    config = ModelConfig.from_file(folder / CONFIG)
    network = empty_network(config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    store = TensorStore.of_model(folder, NETWORK)
    check_names_and_shapes(folder, expected, {name: info.shape for name, info in store.tensors.items()})
    adapter = LoraAdapter.from_file(lora, expected) if lora is not None else None
    for count, (name, stored) in enumerate(store, 1):
        on_device = stored.to(device)
        merged = adapter.merge(name, on_device) if adapter is not None else on_device
        assign(network, name, merged.to(torch.float32 if network.keeps_float32(name) else dtype))
        if progress is not None:
            progress(count, len(expected))
    _log.info("loaded %d tensors of %s as %s on %s", len(expected), folder, dtype, device)
    return network
