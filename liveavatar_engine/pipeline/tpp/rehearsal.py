"""A pipeline whose stages sleep: real processes, links and buffers, and streams for them, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...conditions.audio_features import Features
from ...config import EngineConfig, ModelConfig, StreamGeometry
from ...config.geometry import MOTION_LATENTS
from ...denoise.stream import Conditions, SinkPolicy
from ..runner import StreamOrder
from ..session import Session
from .launch import Launcher, Spawn
from .many_devices import ManyDevices
from .plan import StageCosts, make_plan
from .setup import Weights

_CPU = torch.device("cpu")
_PRIMING_LATENTS = 7
_PROMPT_TOKENS = 2


class Silence:
    """Audio of some blocks that says nothing, of the size that the network reads."""

    def __init__(self, geometry: StreamGeometry, blocks: int) -> None:
        per_block, model = geometry.columns_per_block, geometry.model
        self.columns: int | None = blocks * per_block
        self._blocks = blocks
        self._states = torch.zeros(1, model.audio_layers, model.audio_dim, per_block)

    def block(self, index: int) -> Tensor | None:
        return self._states if index < self._blocks else None

    def ready(self, index: int) -> bool:
        return True


@contextmanager
def rehearsal(
    config: EngineConfig,
    costs: StageCosts,
    model: ModelConfig,
    *,
    launcher: Launcher | None = None,
    trace: bool = False,
) -> Iterator[ManyDevices]:
    """An open pipeline of sleeping stages.

    Args:
        config: with a list of CPU devices, a process each.
        costs: what the stages take, and what the plan is made by.
        model: whose sizes messages have.
        launcher: how processes come to be; None: they are started here.
        trace: whether they collect spans.

    Raises:
        ConfigError: there is no such layout.
        WorkerError: a process has ended.
    """
    plan = make_plan(
        config.devices,
        config.steps,
        costs,
        sequence_parallel=config.sequence_parallel,
        max_sessions=config.max_sessions,
    )
    weights = Weights(sleeping=costs, model=model)
    made = ManyDevices(plan, config, weights, model, launcher or Spawn(), _CPU, trace=trace)
    try:
        yield made
    finally:
        made.close()


def rehearsal_order(
    geometry: StreamGeometry, features: Features, *, update_after: int | None = 4, max_blocks: int | None = None
) -> StreamOrder:
    """A stream that shows nothing."""
    channels, _, height, width = geometry.block_shape
    reference = torch.zeros(channels, 1, height, width)
    context = torch.zeros(_PROMPT_TOKENS, geometry.model.text_dim)
    conditions = Conditions(context, reference, reference.repeat(1, MOTION_LATENTS, 1, 1))
    priming = reference.repeat(1, _PRIMING_LATENTS, 1, 1)
    return StreamOrder(geometry, conditions, SinkPolicy("random", update_after, 0), priming, features, None, max_blocks)


def rehearsal_session(runner: ManyDevices, order: StreamOrder) -> Session:
    """An open session of such a stream."""
    return Session(runner.open(order), [], lambda prompt: order.conditions.context)
