"""`inspect --precision`: what each linear layer would lose in e4m3, to choose `fp8_skip` by."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..config import EngineConfig, StreamGeometry
from ..config.geometry import FRAMES_PER_SECOND, LATENT_FRAME_STRIDE
from ..synthetic import picture, speech

if TYPE_CHECKING:
    from ..pipeline.precision import LayerLoss

_SHOWN = 20
_SIDE = 256
"""Of the synthetic portrait, in pixels."""
_BLOCK_SECONDS = StreamGeometry.frames_per_block * LATENT_FRAME_STRIDE / FRAMES_PER_SECOND


def show_precision(arguments: argparse.Namespace, config: EngineConfig, console: Console) -> None:
    """Run blocks of a stream and print each layer's signal to quantisation noise; `--json` keeps all rows."""
    from ..media.part_file import PartFile

    part = None if arguments.json is None else PartFile(arguments.json)
    try:
        losses = _measure(arguments, config, console)
        if part is not None:
            rows = [dataclasses.asdict(loss) for loss in losses]
            part.part.write_text(json.dumps(rows, indent=1), encoding="utf-8")
            part.publish()
    finally:
        if part is not None:
            part.discard()
    console.print(_kinds_table(losses))
    console.print(_worst_table(losses))
    if arguments.image is None or arguments.audio is None:
        console.print(
            "Measured on a synthetic portrait or sound: give --image and --audio for the real thing.", soft_wrap=True
        )


def _measure(arguments: argparse.Namespace, config: EngineConfig, console: Console) -> list[LayerLoss]:
    from ..pipeline.engine import Engine

    with console.status("loading the checkpoint"):
        engine = Engine.from_pretrained(arguments.folder, arguments.lora, dataclasses.replace(config, graphs=False))
    with console.status(f"running {arguments.blocks} blocks"):
        return engine.precision_losses(
            picture(_SIDE, _SIDE) if arguments.image is None else arguments.image,
            speech((arguments.blocks + 1) * _BLOCK_SECONDS) if arguments.audio is None else arguments.audio,
            arguments.prompt,
            max_blocks=arguments.blocks,
        )


def _kinds_table(losses: list[LayerLoss]) -> Table:
    """Layers of the same place in different blocks taken together."""
    kinds: dict[str, list[LayerLoss]] = defaultdict(list)
    for loss in losses:
        kinds[re.sub(r"\.\d+\.", ".*.", loss.name, count=1)].append(loss)
    table = Table(title="kinds of linear layers: SQNR in e4m3, dB", title_justify="left")
    table.add_column("layers", overflow="fold")
    for heading in ("count", "least", "median", "worst token", "weights alone"):
        table.add_column(heading, justify="right")
    table.add_column("with the skip list")
    for kind, members in sorted(kinds.items(), key=lambda item: min(loss.sqnr for loss in item[1])):
        table.add_row(
            kind,
            str(len(members)),
            f"{min(loss.sqnr for loss in members):.1f}",
            f"{median(loss.sqnr for loss in members):.1f}",
            f"{min(loss.worst_sqnr for loss in members):.1f}",
            f"{min(loss.weight_sqnr for loss in members):.1f}",
            "kept out" if members[0].skipped else "e4m3",
        )
    return table


def _worst_table(losses: list[LayerLoss]) -> Table:
    table = Table(title=f"layers that lose most, of {len(losses)}", title_justify="left")
    table.add_column("layer", overflow="fold")
    for heading in ("SQNR, dB", "worst token", "weight alone"):
        table.add_column(heading, justify="right")
    for loss in losses[:_SHOWN]:
        table.add_row(loss.name, f"{loss.sqnr:.1f}", f"{loss.worst_sqnr:.1f}", f"{loss.weight_sqnr:.1f}")
    return table
