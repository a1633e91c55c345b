"""What a worker is told before it starts, and how it gets its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...config import EngineConfig, ModelConfig
from ...weights.budget import expected_geometry, require_room
from ...weights.memory import Share
from ..device import log_kernels
from ..source import Files, RandomWeights, Source
from .plan import RankPlan, StageCosts
from .sleeping import SleepingDecoding, SleepingDenoising
from .stages import Decoding, Denoising, ModelDecoding, ModelDenoising

Progress = Callable[[int, int], None]
"""Called with the tensors loaded and to be loaded."""


@dataclass(frozen=True)
class Weights:
    """Where a worker's weights come from.

    Attributes:
        checkpoint: folder of the checkpoint; None with `preset` or `sleeping`.
        lora: adapter to merge, or None.
        vae: file of a light decoder, or None.
        lora_scale: of the adapter, alpha / rank; None: what its file says.
        sleeping: costs of stages that only take their time, in place of a model.
        model: of which they pretend to be.
        preset: sizes of random weights, in place of a checkpoint.
        seed: of these.
    """

    checkpoint: str | None = None
    lora: str | None = None
    vae: str | None = None
    lora_scale: float | None = None
    sleeping: StageCosts | None = None
    model: ModelConfig | None = None
    preset: str | None = None
    seed: int = 0

    @classmethod
    def of(cls, source: Files | RandomWeights) -> Weights:
        """As a worker, which may run in another folder, is told where an engine's parts come from."""
        if isinstance(source, RandomWeights):
            return cls(vae=_text(source.vae), preset=source.preset, seed=source.seed)
        return cls(str(source.checkpoint.resolve()), _text(source.lora), _text(source.vae), source.lora_scale)

    @property
    def source(self) -> Source:
        """What makes the parts, where stages do not sleep."""
        if self.preset is not None:
            return RandomWeights(self.preset, self.seed, _path(self.vae))
        assert self.checkpoint is not None
        return Files(Path(self.checkpoint), _path(self.lora), _path(self.vae), self.lora_scale)


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
    rank, config, source = setup.rank, setup.config, setup.weights.source
    log_kernels(device)
    model = source.model()
    require_room(expected_geometry(model, config), source.sizes(), config, device, share_of(rank, setup.sessions))
    denoising = decoding = None
    if rank.decoder is not None:
        decoding = ModelDecoding(source.decoder(config, device), config, device)
    if rank.steps:
        denoising = ModelDenoising(source.network(config, device, progress), config, rank.steps, setup.sessions)
    return Stages(model, denoising, decoding)


def share_of(rank: RankPlan, sessions: int) -> Share:
    """What a worker holds of an engine, for `sessions` at once."""
    steps = len(rank.steps)
    return Share(
        denoises=steps > 0,
        decodes=rank.decoder is not None,
        steps=max(1, steps),
        mates=rank.mates if steps else 1,
        sessions=sessions,
    )


def _sleeping(setup: WorkerSetup, costs: StageCosts) -> Stages:
    rank, model = setup.rank, setup.weights.model
    assert model is not None
    denoising = SleepingDenoising(costs, rank.steps, setup.config.steps, rank.mates) if rank.steps else None
    decoding = None if rank.decoder is None else SleepingDecoding(costs)
    return Stages(model, denoising, decoding)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
