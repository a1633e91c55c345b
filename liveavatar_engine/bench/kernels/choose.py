"""Rows of fp8_linear/choices.json from what was measured."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from liveavatar_kernels.fp8_linear import OP, choices
from liveavatar_kernels.fp8_linear.cases import model_cases
from liveavatar_kernels.model_sizes import ModelSizes

from .rows import TRUTHS, Row
from .subjects import FP8_LINEAR

PATH = choices._PATH
_CLEAR_WIN = 1.02
"""An implementation later in the op's order must be this many times as fast as an earlier one to be chosen."""


class NothingToChooseError(ValueError):
    """No layer was measured at every picture size."""


def choose(rows: Sequence[Row], sizes: ModelSizes, device: str, commit: str, command: str) -> list[dict[str, Any]]:
    """A row for every layer that some implementation computed at every picture size; the times are means over these."""
    times = {(row.case, row.implementation): row.us for row in rows if row.op == FP8_LINEAR.name and row.us is not None}
    layers = defaultdict(list)
    for case in model_cases(sizes):
        layers[case.in_features, case.out_features, case.gelu, case.quantized].append(case.name)
    names = [implementation.name for implementation in OP.implementations if implementation.name not in TRUTHS]
    chosen = []
    for (inner, outer, gelu, quantized), cases in layers.items():
        everywhere = [name for name in names if all((case, name) in times for case in cases)]
        us = {name: round(fmean(times[case, name] for case in cases), 2) for name in everywhere}
        if not us:
            continue
        best = next(name for name in us if us[name] <= _CLEAR_WIN * min(us.values()))
        chosen.append(
            {
                "device": device,
                "in": inner,
                "out": outer,
                "gelu": gelu,
                "quantized": quantized,
                "implementation": best,
                "measured": {"commit": commit, "command": command, "us": us},
            }
        )
    return chosen


def updated(text: str, chosen: Sequence[dict[str, Any]]) -> str:
    """The table with `chosen` in place of what it says about these layers on that device.

    Raises:
        NothingToChooseError: nothing is chosen.
        ValueError: the table is broken.
    """
    if not chosen:
        raise NothingToChooseError("no layer of fp8_linear was measured at every picture size: run without --quick")
    names = [implementation.name for implementation in OP.implementations]
    choices.parse(text, names)
    layers = [_layer(row) for row in chosen]
    rows = [row for row in json.loads(text) if _layer(row) not in layers] + list(chosen)
    table = json.dumps(sorted(rows, key=_layer), indent=1) + "\n"
    choices.parse(table, names)
    return table


def _layer(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[field] for field in ("device", "in", "out", "gelu", "quantized"))
