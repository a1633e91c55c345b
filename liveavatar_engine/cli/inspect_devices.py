"""`inspect --devices`: which device would do what, and how fast that would be."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..bench.layout import device_names, known_costs, plan_table
from ..config import EngineConfig
from ..errors import ConfigError
from ..pipeline.tpp.plan import Plan, make_plan

if TYPE_CHECKING:
    from ..weights.memory import MemoryEstimate

_WEIGHTS = ("network", "text encoder", "audio encoder", "VAE")
_WORKING = ("graphs", "working memory")
"""Rows of a prediction of memory; what else there is belongs to streams."""


def show_devices(arguments: argparse.Namespace, config: EngineConfig | None, console: Console) -> None:
    """Print the layout of a pipeline and what follows from its costs; nothing is opened or measured.

    With `config`, also the memory that the checkpoint in `arguments.folder` needs on every device.

    Raises:
        ConfigError: there is no such layout.
        CheckpointError: the checkpoint cannot be used.
        InputError: the file with costs cannot be used.
    """
    from ..pipeline.tpp.simulate import FRAMES_PER_BLOCK, real_time_sessions

    known = known_costs(arguments)
    costs = known.costs
    plan = make_plan(
        device_names(arguments.devices),
        arguments.steps,
        costs,
        sequence_parallel=arguments.sequence_parallel,
        max_sessions=arguments.sessions,
    )
    memory = None if config is None else _memory_table(arguments.folder, config, plan)
    console.print(plan_table(plan, costs))
    if memory is not None:
        console.print(memory)
    first = max(lane.first_frame(costs) for lane in plan.lanes)
    early = max(lane.first_frame(costs, early=True) for lane in plan.lanes)
    served = sum(real_time_sessions(lane, costs) for lane in plan.lanes)
    shared = f"; {arguments.sequence_parallel} devices are taken to share a step evenly"
    for line in (
        f"predicted: {plan.fps(costs, FRAMES_PER_BLOCK):.1f} frames/s in total, a block every "
        f"{plan.bottleneck(costs) * 1e3:.4g} ms{' in the slowest lane' if len(plan.lanes) > 1 else ''}",
        f"first frame {first * 1e3:.4g} ms after its audio, {early * 1e3:.4g} ms with early_first_frame",
        f"sessions in real time (25 frames/s each): {served}",
        known.basis + (shared if arguments.sequence_parallel > 1 else ""),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _memory_table(folder: Path, config: EngineConfig, plan: Plan) -> Table:
    """What every rank needs, and the engine's own process, which encodes conditions."""
    table = Table(title=f"memory of {folder}", title_justify="left")
    for heading in ("rank", "device", "stage", "weights", "streams", "working", "total"):
        table.add_column(heading, justify="left" if heading in ("device", "stage") else "right")
    for rank, device, stage, memory in _estimates(folder, config, plan):
        sizes = {row.name: row.bytes for row in memory.rows}
        weights, working = (sum(sizes.pop(name, 0) for name in names) for names in (_WEIGHTS, _WORKING))
        cells = (decimal(size) for size in (weights, sum(sizes.values()), working, memory.total))
        table.add_row(rank, device, stage, *cells)
    table.caption = "estimates; CUDA's own contexts come on top"
    return table


def _estimates(folder: Path, config: EngineConfig, plan: Plan) -> Iterator[tuple[str, str, str, MemoryEstimate]]:
    """Rank, device, stage and memory."""
    import torch

    from ..pipeline.source import Files
    from ..pipeline.tpp.setup import share_of
    from ..weights.budget import expected_geometry
    from ..weights.memory import Share, predict_memory

    source = Files(folder)
    config = source.settled(config)
    geometry, sizes = expected_geometry(source.model(), config), source.sizes()
    geometry.heads_per_rank(config.sequence_parallel)

    def predicted(name: str, share: Share) -> MemoryEstimate:
        kind = name.partition(":")[0]
        if kind not in ("cpu", "cuda"):
            raise ConfigError(f"device {name!r}: expected cpu:N or cuda:N")
        return predict_memory(geometry, sizes, config, torch.device(kind), share)

    sessions = -(-config.max_sessions // len(plan.lanes))
    for rank in plan.ranks:
        yield str(rank.rank), rank.device, rank.stage, predicted(rank.device, share_of(rank, sessions))
    beside = next(rank.device for rank in plan.ranks if rank.decoder is not None)
    yield "-", beside, "encoders", predicted(beside, Share(encodes=True, sessions=config.max_sessions))
