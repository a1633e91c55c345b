"""Which implementation was fastest for a layer on a device, as measured: `choices.json`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

_PATH = Path(__file__).with_name("choices.json")
_FIELDS = {
    "device": str,
    "in": int,
    "out": int,
    "gelu": bool,
    "quantized": bool,
    "implementation": str,
    "measured": dict,
}
_MEASURED = {"commit": str, "command": str, "us": dict}


class Layer(NamedTuple):
    """What a choice is made for: a device by its name, and a layer.

    Attributes:
        quantized: whether the result is e4m3, its quantisation counted in.
    """

    device: str
    in_features: int
    out_features: int
    gelu: bool
    quantized: bool


def parse(text: str, implementations: Collection[str]) -> dict[Layer, str]:
    """Read the table: a JSON list of rows with the fields above, one for a layer.

    Raises:
        ValueError: naming the row and what is wrong with it.
    """
    table: dict[Layer, str] = {}
    for number, row in enumerate(json.loads(text), start=1):
        name = f"row {number}"
        _check_fields(name, row, _FIELDS)
        layer = Layer(row["device"], row["in"], row["out"], row["gelu"], row["quantized"])
        name += f" ({layer.device}, {layer.in_features} -> {layer.out_features})"
        _check_fields(f"{name}: measured", row["measured"], _MEASURED)
        times = row["measured"]["us"]
        for implementation in (row["implementation"], *times):
            if implementation not in implementations:
                raise ValueError(
                    f"{name}: no implementation {implementation!r}; there are {', '.join(implementations)}"
                )
        if row["implementation"] not in times:
            raise ValueError(f"{name}: no time of {row['implementation']!r} is given")
        if layer in table:
            raise ValueError(f"{name}: an earlier row chooses for the same layer")
        table[layer] = row["implementation"]
    return table


def preferred(device: torch.device, implementations: tuple[str, ...], *layer: Any) -> tuple[str, ...]:
    """The implementation to prefer for a `Layer` given without its device; none where nothing was measured.

    Raises:
        ValueError: the table is broken.
    """
    if device.type != "cuda":
        return ()
    table = _shipped(implementations)
    choice = table.get(Layer(torch.cuda.get_device_name(device), *layer)) if table else None
    return () if choice is None else (choice,)


# As torch.compiler.assume_constant_result does, which imports the compiler: nobody can trace the reading of a file.
preferred._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _shipped(implementations: tuple[str, ...]) -> dict[Layer, str]:
    try:
        return parse(_PATH.read_text(encoding="utf-8"), implementations)
    except ValueError as error:
        raise ValueError(f"{_PATH}: {error}") from None


def _check_fields(name: str, row: Any, fields: Mapping[str, type]) -> None:
    if not isinstance(row, dict) or row.keys() != fields.keys():
        raise ValueError(f"{name}: expected the fields {', '.join(fields)}, not {row}")
    for field, kind in fields.items():
        if type(row[field]) is not kind:
            raise ValueError(f"{name}: {field} must be of type {kind.__name__}, not {row[field]!r}")
