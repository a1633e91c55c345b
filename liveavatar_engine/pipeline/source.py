"""Where an engine's parts come from: the files of a checkpoint, or random weights at a preset's sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from ..config import EngineConfig, ModelConfig
from ..model import Network
from ..vae.light import LightDecoder, load_decoder
from ..vae.vae import Vae
from ..weights.budget import part_sizes
from ..weights.conversion import settled
from ..weights.layout import Checkpoint
from ..weights.memory import PartSizes
from ..weights.network import LoadProgress, load_network
from ..weights.presets import PRESETS
from ..weights.random_parts import RandomParts, random_sizes
from .device import resolve_precision
from .encoders import Encoders
from .offload import fetchers, load_offloadable_vae


class Source(Protocol):
    """Makes the parts of an engine, or of one of its workers, on a device.

    All methods may raise a CheckpointError, and a ConfigError where a configuration does not go with the parts.
    """

    @property
    def name(self) -> str:
        """For logs."""
        ...

    @property
    def vae(self) -> Path | None:
        """File of a light decoder, if one makes the frames."""
        ...

    def settled(self, config: EngineConfig) -> EngineConfig:
        """A configuration, with what a converted checkpoint has decided."""
        ...

    def model(self) -> ModelConfig:
        """Sizes of the network."""
        ...

    def sizes(self) -> PartSizes:
        """Sizes of the parts around it."""
        ...

    def network(self, config: EngineConfig, device: torch.device, progress: LoadProgress | None) -> Network:
        """The network in its final precision."""
        ...

    def decoder(self, config: EngineConfig, device: torch.device) -> Vae | LightDecoder:
        """What makes frames."""
        ...

    def encoders(self, config: EngineConfig, device: torch.device) -> Encoders:
        """What encodes conditions."""
        ...


@dataclass(frozen=True)
class Files:
    """A checkpoint.

    Attributes:
        checkpoint: folder.
        lora: adapter to merge, or None.
        vae: of a light decoder, or None.
        lora_scale: of the adapter, alpha / rank; None: what its file says.

    Raises:
        CheckpointError: parts of the checkpoint are missing.
    """

    checkpoint: Path
    lora: Path | None = None
    vae: Path | None = None
    lora_scale: float | None = None

    @property
    def name(self) -> str:
        return str(self.checkpoint)

    @cached_property
    def found(self) -> Checkpoint:
        """The parts' paths."""
        return Checkpoint(self.checkpoint)

    def settled(self, config: EngineConfig) -> EngineConfig:
        return settled(config, self.found.root, self.lora)

    def model(self) -> ModelConfig:
        return ModelConfig.from_file(self.found.config)

    def sizes(self) -> PartSizes:
        return part_sizes(self.found)

    def network(self, config: EngineConfig, device: torch.device, progress: LoadProgress | None) -> Network:
        precision = resolve_precision(config, device)
        dtype, skip = precision.dtype, precision.fp8_skip
        return load_network(self.found.root, self.lora, dtype, device, progress, skip, lora_scale=self.lora_scale)

    def decoder(self, config: EngineConfig, device: torch.device) -> Vae | LightDecoder:
        precision = resolve_precision(config, device).decoder
        if self.vae is not None:
            return load_decoder(self.vae, precision, device)
        return load_offloadable_vae(self.found.vae, precision, device, fetchers(config, device).get("vae"))

    def encoders(self, config: EngineConfig, device: torch.device) -> Encoders:
        return Encoders.load(self.found, config, device)


@dataclass(frozen=True)
class RandomWeights:
    """Weights that are drawn on the device; there is no text encoder, a prompt's context is random itself.

    Attributes:
        preset: name of the sizes.
        seed: of the weights.
        vae: file of a light decoder, or None.
    """

    preset: str
    seed: int = 0
    vae: Path | None = None

    @property
    def name(self) -> str:
        return f"random weights ({self.preset})"

    def settled(self, config: EngineConfig) -> EngineConfig:
        return config

    def model(self) -> ModelConfig:
        return PRESETS[self.preset].model

    def sizes(self) -> PartSizes:
        return random_sizes(PRESETS[self.preset])

    def network(self, config: EngineConfig, device: torch.device, progress: LoadProgress | None) -> Network:
        return self._parts(config, device).network

    def decoder(self, config: EngineConfig, device: torch.device) -> Vae | LightDecoder:
        if self.vae is not None:
            return load_decoder(self.vae, resolve_precision(config, device).decoder, device)
        return self._parts(config, device).vae

    def encoders(self, config: EngineConfig, device: torch.device) -> Encoders:
        parts = self._parts(config, device)
        return Encoders(parts.vae, parts.text_encoder, parts.audio_encoder)

    def _parts(self, config: EngineConfig, device: torch.device) -> RandomParts:
        return RandomParts(PRESETS[self.preset], resolve_precision(config, device), device, self.seed)
