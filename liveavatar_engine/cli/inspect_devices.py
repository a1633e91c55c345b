"""`inspect --devices`: which device would do what, and how fast that would be."""

from __future__ import annotations

import argparse

from rich.console import Console

from ..bench.layout import device_names, known_costs, plan_table
from ..pipeline.tpp.plan import make_plan


def show_devices(arguments: argparse.Namespace, console: Console) -> None:
    """Print the layout of a pipeline and what follows from its costs; nothing is opened or measured.

    Raises:
        ConfigError: there is no such layout.
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
    console.print(plan_table(plan, costs))
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
