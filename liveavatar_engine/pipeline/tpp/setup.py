"""What a worker is told before it starts, and how it gets its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...config import EngineConfig, ModelConfig
from ...vae.light import load_decoder
from ...weights.layout import Checkpoint
from ...weights.network import load_network
from ..device import log_kernels, resolve_precision
from ..offload import fetchers, load_offloadable_vae
from .plan import RankPlan, StageCosts
from .sleeping import SleepingDecoding, SleepingDenoising
from .stages import Decoding, Denoising, ModelDecoding, ModelDenoising

Progress = Callable[[int, int], None]
"""Called with the tensors loaded and to be loaded."""


@dataclass(frozen=True)
class Weights:
    """Where a worker's weights come from.

    Attributes:
        checkpoint: folder of the checkpoint; None with `sleeping`.
        lora: adapter to merge, or None.
        vae: file of a light decoder, or None.
        lora_scale: of the adapter, alpha / rank; None: what its file says.
        sleeping: costs of stages that only take their time, in place of a model.
        model: of which they pretend to be.
    """

    checkpoint: str | None = None
    lora: str | None = None
    vae: str | None = None
    lora_scale: float | None = None
    sleeping: StageCosts | None = None
    model: ModelConfig | None = None


@dataclass(frozen=True)
class WorkerSetup:
    """All that a worker is told.

    Attributes:
        rank: its part of the plan.
        config: settled, with the device names of the plan.
        weights: where they come from.
        sessions: that its lane serves at once.
        threads: of torch on the CPU, as many as the engine's own process has.
    """

    rank: RankPlan
    config: EngineConfig
    weights: Weights
    sessions: int
    threads: int

    def encode(self) -> dict[str, Any]:
        """As JSON values."""
        values = dataclasses.asdict(self)
        values["rank"]["steps"] = [self.rank.steps.start, self.rank.steps.stop]
        return values

    @classmethod
    def decode(cls, values: Mapping[str, Any]) -> WorkerSetup:
        """What `encode` made."""
        rank, weights = dict(values["rank"]), dict(values["weights"])
        rank["steps"] = range(*rank["steps"])
        if weights["sleeping"] is not None:
            weights["sleeping"] = StageCosts(**weights["sleeping"])
        if weights["model"] is not None:
            sizes: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in weights["model"].items()}
            weights["model"] = ModelConfig(**sizes)
        return cls(
            RankPlan(**rank),
            EngineConfig.from_mapping(values["config"]),
            Weights(**weights),
            values["sessions"],
            values["threads"],
        )


@dataclass(frozen=True)
class Stages:
    """What a worker does: denoising, decoding or both; and the sizes of the network."""

    model: ModelConfig
    denoising: Denoising | None
    decoding: Decoding | None


def load_stages(setup: WorkerSetup, device: torch.device, progress: Progress) -> Stages:
    """Load what a worker needs, and no more.

    Raises:
        CheckpointError, ConfigError, DeviceMemoryError: it cannot be loaded.
    """
    if setup.weights.sleeping is not None:
        return _sleeping(setup, setup.weights.sleeping)
    rank, config, weights = setup.rank, setup.config, setup.weights
    assert weights.checkpoint is not None
    log_kernels(device)
    found, precision = Checkpoint(Path(weights.checkpoint)), resolve_precision(config, device)
    denoising = decoding = None
    if rank.decoder is not None:
        if weights.vae is not None:
            decoder = load_decoder(Path(weights.vae), precision.decoder, device)
        else:
            fetcher = fetchers(config, device).get("vae")
            decoder = load_offloadable_vae(found.vae, precision.decoder, device, fetcher)
        decoding = ModelDecoding(decoder, config, device)
    if rank.steps:
        lora = None if weights.lora is None else Path(weights.lora)
        dtype, skip, scale = precision.dtype, precision.fp8_skip, weights.lora_scale
        network = load_network(found.root, lora, dtype, device, progress, skip, lora_scale=scale)
        denoising = ModelDenoising(network, config, rank.steps, setup.sessions)
    return Stages(ModelConfig.from_file(found.config), denoising, decoding)


def _sleeping(setup: WorkerSetup, costs: StageCosts) -> Stages:
    rank, model = setup.rank, setup.weights.model
    assert model is not None
    denoising = SleepingDenoising(costs, rank.steps, setup.config.steps, rank.mates) if rank.steps else None
    decoding = None if rank.decoder is None else SleepingDecoding(costs)
    return Stages(model, denoising, decoding)
