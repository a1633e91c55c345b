"""Names of the runs of a suite, from what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .results import Run

_SHOWN_ALONE = ("preset", "size", "precision", "mode", "devices")
_HIDDEN = ("blocks", "warm_up", "seed", "device", "simulated")


def labels(runs: Sequence[Run]) -> list[str]:
    """One name per run: the settings that differ among them; for a single one, what matters most."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings if key not in _HIDDEN))
    varied = [key for key in keys if len({str(run.settings.get(key)) for run in runs}) > 1]
    chosen = varied or [key for key in keys if key in _SHOWN_ALONE]
    return [", ".join(_told(key, run.settings[key]) for key in chosen if key in run.settings) or "all" for run in runs]


def _told(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"{key.replace('_', ' ')} {'on' if value else 'off'}"
    match key:
        case "steps":
            return f"{value} steps"
        case "devices":
            return f"{value} device{'s' * (value != 1)}"
        case "kv_precision":
            return f"kv {value}"
        case "kv_mode":
            return f"{value} cache"
        case "precision" if value == "auto":
            return "precision auto"
        case _:
            return str(value)
