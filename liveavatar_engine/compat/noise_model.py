"""A pipeline's `noise_model`: the network that is to be loaded, with what has been asked of it so far.

The reference loads first, then merges an adapter, then converts to FP8. Here each weight is loaded once, merged and
quantised on its way to the device that needs it; so what is asked is written down, and done when the first video is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig
from ..errors import ConfigError
from ..model.quantize import linears_to_quantize
from ..weights.layout import Checkpoint
from ..weights.lora import LoraAdapter
from ..weights.network import empty_network, network_shapes
from .lora_file import adapter_file


@dataclass(frozen=True)
class Adapter:
    """An adapter to be merged, with alpha / rank."""

    file: Path
    scale: float


class NoiseModel:
    """Stands for the network of a checkpoint; holds no weights.

    Attributes:
        config: its sizes, under the reference's names; also found as attributes of this object.
        param_dtype: of most weights.
        adapter: to be merged, or None.
        fp8_skip: parts of the names of linear layers that stay out of e4m3; None: all do.
        num_frame_per_block: latent frames of a block.
    """

    def __init__(self, found: Checkpoint, param_dtype: torch.dtype, num_frame_per_block: int) -> None:
        self.config = ModelConfig.from_file(found.config)
        self.param_dtype, self.num_frame_per_block = param_dtype, num_frame_per_block
        self.adapter: Adapter | None = None
        self.fp8_skip: tuple[str, ...] | None = None
        self._loaded = False

    @property
    def dtype(self) -> torch.dtype:
        return self.param_dtype

    def add_adapter(self, name: str | Path, rank: int, alpha: float, targets: Sequence[str]) -> None:
        """Merge a LoRA when the network is loaded; its file is checked now.

        Raises:
            ConfigError: there is one already, the network is in e4m3 or in use, or the file has another rank or layers.
            CheckpointError: the file is missing, damaged, or of another model.
        """
        self._check_open("a LoRA")
        if self.adapter is not None:
            raise ConfigError(f"LoRA {name}: {self.adapter.file} is merged already; merge both into one file first")
        if self.fp8_skip is not None:
            raise ConfigError(f"LoRA {name}: add it before the layers become FP8, as the reference's scripts do")
        file = adapter_file(name)
        read = LoraAdapter.from_file(file, network_shapes(self.config), scale=alpha / rank)
        if read.rank != rank:
            raise ConfigError(f"{file}: of rank {read.rank}, not lora_rank={rank}")
        strange = sorted(weight for weight in read.down if not _ends_with_any(weight.removesuffix(".weight"), targets))
        if strange:
            raise ConfigError(f"{file}: changes {strange[0]}, which is none of lora_target_modules {','.join(targets)}")
        self.adapter = Adapter(file, alpha / rank)

    def use_fp8(self, ignore: Sequence[str]) -> None:
        """Load linear layers in e4m3, but for those whose names contain one of `ignore`.

        Raises:
            ConfigError: the network is in use, or an entry is part of no layer's name.
        """
        self._check_open("FP8")
        linears_to_quantize(empty_network(self.config), ignore)
        self.fp8_skip = tuple(ignore)

    def settle(self) -> None:
        """The weights are loaded now: nothing more can be asked."""
        self._loaded = True

    def eval(self) -> NoiseModel:
        """Nothing to do: it only infers."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> NoiseModel:
        """Weights need no gradients; asking for them is an error."""
        if requires_grad:
            raise ConfigError("noise_model: this backend does not train")
        return self

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("config")
        if config is not None and not name.startswith("_") and hasattr(config, name):
            return getattr(config, name)
        raise AttributeError(
            f"noise_model has no {name!r}: its weights are loaded when the first video is made. LoRA goes through "
            "add_lora_to_model, FP8 through liveavatar_engine.compat.replace_linear_with_scaled_fp8; a network to call "
            "and change is liveavatar_engine.compat.CausalWanModel_S2V"
        )

    def _check_open(self, what: str) -> None:
        if self._loaded:
            raise ConfigError(f"{what}: the network is loaded already; ask for it before the first generate")


def _ends_with_any(layer: str, targets: Sequence[str]) -> bool:
    """Whether PEFT would adapt a layer: its name is a target, or ends with one behind a dot."""
    return any(layer == target or layer.endswith(f".{target}") for target in targets)
