"""What a pipeline's layout is chosen from, as users give it: devices, and what its stages cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..config.engine import DESIGN_STAGE_MS
from ..errors import ConfigError, InputError
from ..pipeline.tpp.plan import Plan, StageCosts

_STEP, _DECODE = ("step", "step_ms_p50"), ("vae", "decode_ms_p50")
"""Suite and figure of the benchmark."""


@dataclass(frozen=True)
class KnownCosts:
    """Costs, and where they come from.

    Attributes:
        costs: of the stages.
        basis: a sentence for people.
    """

    costs: StageCosts
    basis: str


def add_cost_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what `known_costs` reads."""
    group.add_argument("--step-ms", type=float, metavar="X", help="a denoise step of a block on one device")
    group.add_argument("--vae-ms", type=float, metavar="X", help="a block's decode on one device")
    group.add_argument("--transfer-ms", type=float, metavar="X", help="latents to the next stage (default 0)")
    group.add_argument("--costs", type=Path, metavar="FILE", help="step and decode from the benchmark's --json instead")


def known_costs(arguments: argparse.Namespace) -> KnownCosts:
    """Costs that were given, else measured, else those that the design aims at.

    Raises:
        ConfigError: a cost is none.
        InputError: the file cannot be used.
    """
    measured, where = ({}, "") if arguments.costs is None else _read(arguments.costs)
    found, basis = {}, []
    for name, given, key, target in (
        ("step", arguments.step_ms, _STEP, DESIGN_STAGE_MS[0]),
        ("decode", arguments.vae_ms, _DECODE, DESIGN_STAGE_MS[1]),
    ):
        if given is not None:
            found[name], source = given, "given"
        elif key in measured:
            found[name], source = measured[key], where
        else:
            found[name], source = target, "the design's target, not measured here"
        basis.append(f"{name} {found[name]:.4g} ms ({source})")
    costs = StageCosts.of(found["step"], found["decode"], arguments.transfer_ms or 0.0)
    basis.append(
        f"transfer {costs.transfer * 1e3:.4g} ms ({'not given' if arguments.transfer_ms is None else 'given'})"
    )
    assumed = "the first latent's decode is taken for a third of a block's, the sink's prefill for a step"
    return KnownCosts(costs, f"costs: {', '.join(basis)}; {assumed}")


def device_names(text: str) -> tuple[str, ...]:
    """ "5" is the first five GPUs; "cuda:0,cuda:2" is what it says.

    Raises:
        ConfigError: it is neither.
    """
    if text.strip().lstrip("-").isdigit():
        count = int(text)
        if count < 1:
            raise ConfigError(f"--devices: expected at least 1 device, not {count}")
        return tuple(f"cuda:{index}" for index in range(count))
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ConfigError(f"--devices: expected a number, or names such as cuda:0,cuda:1, not {text!r}")
    return names


def plan_table(plan: Plan, costs: StageCosts) -> Table:
    """A line per rank: what it does, and for how much of each block's time."""
    table = Table(title=f"{len(plan)} device{'s' if len(plan) > 1 else ''}", title_justify="left")
    for heading in ("rank", "device", "lane", "stage", "ms per block", "of the lane's time"):
        table.add_column(heading, justify="left" if heading in ("device", "stage") else "right")
    for number, lane in enumerate(plan.lanes):
        seconds, bottleneck = lane.seconds(costs), lane.bottleneck(costs)
        for rank in lane.ranks:
            depth = next((at for at, stage in enumerate(lane.stages) if rank in stage), len(lane.stages))
            decodes = costs.decode if rank.steps and lane.stages[depth][0].decoder is not None else 0.0
            own = seconds[depth] - (decodes if rank.decoder is None else 0.0)
            share = own / bottleneck / (1 if rank.steps else len(lane.decoders))
            names = (Text(rank.device), str(number), Text(rank.stage))
            table.add_row(str(rank.rank), *names, f"{own * 1e3:.4g}", f"{share:.0%}")
        table.add_section()
    return table


def _read(path: Path) -> tuple[dict[tuple[str, str], float], str]:
    """Medians in a benchmark's document, and where they were measured."""
    from .schema import validate

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--costs {path}: {error}") from None
    complaints = validate(document)
    if complaints:
        raise InputError(f"--costs {path}: no document of the benchmark: {complaints[0]}")
    found = {key: value for key in (_STEP, _DECODE) if (value := _median(path, document, *key)) is not None}
    if not found:
        raise InputError(f"--costs {path}: holds no measured run of the suites {_STEP[0]} and {_DECODE[0]}")
    environment = document["environment"]
    return found, f"measured on {environment['device']}, {environment['date'][:10]}"


def _median(path: Path, document: Mapping[str, Any], suite: str, figure: str) -> float | None:
    from .results import MEASURED

    runs = [run for run in document["runs"] if run["suite"] == suite and run["status"] == MEASURED]
    if len(runs) > 1:
        raise InputError(f"--costs {path}: {len(runs)} runs of the suite {suite}, of a sweep; name a file with one")
    return runs[0]["figures"].get(figure, {}).get("value") if runs else None
