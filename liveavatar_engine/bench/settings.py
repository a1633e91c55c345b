"""What is measured: the points of a sweep, each an engine's settings and how much of it is run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config import EngineConfig, ModelConfig, Size, StreamGeometry
from ..config.engine import PRECISIONS
from ..errors import ConfigError
from ..weights.conversion import settled
from ..weights.layout import CONFIG
from ..weights.presets import PRESETS

GPU_PRESET, CPU_PRESET = "14b", "tiny"
GPU_SIZE, CPU_SIZE = "704x384", "128x128"


@dataclass(frozen=True)
class Settings:
    """One point.

    Attributes:
        preset: of random weights; None with a checkpoint.
        checkpoint, lora: a checkpoint directory and an adapter to merge, or None.
        vae: a file with a light decoder's weights, or None.
        device: as of `EngineConfig.devices`, resolved: "cpu" or "cuda:N".
        size: "WxH".
        precision, kv_precision, steps, schedule, kv_mode, graphs, motion_tokens: as of `EngineConfig`.
        blocks: that are measured.
        warm_up: blocks before these, whose times are left out. The ring is full after four.
        seed: of weights, noise and inputs.

    Raises:
        ConfigError: a setting is unknown, contradicts another one or is none that the model can have.
    """

    preset: str | None
    checkpoint: str | None
    lora: str | None
    device: str
    size: str
    precision: str = "auto"
    kv_precision: str = "auto"
    steps: int = EngineConfig.steps
    schedule: str = EngineConfig.schedule
    kv_mode: str = "timestep"
    graphs: bool = True
    motion_tokens: bool = True
    blocks: int = 20
    warm_up: int = 5
    seed: int = 0
    vae: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("blocks", 1), ("warm_up", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        object.__setattr__(self, "size", exact_size(self.size))
        self.engine_config()
        self.geometry()

    def engine_config(self, **changes: Any) -> EngineConfig:
        """The engine's settings, with `changes`, and with what a converted checkpoint decides.

        Raises:
            ConfigError: they are not available, or contradict each other or the checkpoint.
            CheckpointError: the checkpoint has no usable `config.json`.
        """
        chosen = {
            "size": self.size,
            "precision": self.precision,
            "kv_precision": self.kv_precision,
            "devices": self.device,
            "steps": self.steps,
            "schedule": self.schedule,
            "graphs": self.graphs,
            "motion_tokens": self.motion_tokens,
            "features": "windowed",
            "kv_mode": self.kv_mode,
            **changes,
        }
        config = EngineConfig.from_mapping(chosen)
        if self.checkpoint is None:
            return config
        return settled(config, Path(self.checkpoint), None if self.lora is None else Path(self.lora))

    def model(self) -> ModelConfig:
        """The network's sizes.

        Raises:
            CheckpointError: the checkpoint has no usable `config.json`.
        """
        if self.preset is not None:
            return PRESETS[self.preset].model
        assert self.checkpoint is not None
        return ModelConfig.from_file(Path(self.checkpoint) / CONFIG)

    def geometry(self) -> StreamGeometry:
        """Of the stream.

        Raises:
            ConfigError: the model cannot have this picture size.
        """
        size = Size.parse(self.size)
        return StreamGeometry(self.model(), size.height, size.width, motion_tokens=self.motion_tokens)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def exact_size(text: str) -> str:
    """A picture size as "WxH"; an area "W*H" is taken for a picture of W to H.

    Raises:
        ConfigError: as of `Size.parse`.
    """
    size = Size.parse(text)
    height, width = size.sides(size.height, size.width)
    return f"{width}x{height}"


def sweep_points(base: Settings, sweep: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """`base` at every combination of the values that `sweep` names; the key named last varies fastest.

    Raises:
        ConfigError: a point is not available; it is named.
    """
    points = []
    for values in itertools.product(*sweep.values()):
        changes = dict(zip(sweep, values, strict=True))
        try:
            points.append(replace(base, **changes))
        except ConfigError as error:
            named = ", ".join(f"{key}={value}" for key, value in changes.items())
            raise ConfigError(f"--sweep, at {named}: {error}" if changes else str(error)) from None
    return points


def parse_sweep(words: Sequence[str]) -> dict[str, list[Any]]:
    """Read "size=704x384,720x400 precision=bf16,fp8" from its words; a comma may stand for the space.

    Returns:
        Setting -> values, in the order given.

    Raises:
        ConfigError: something is no key=value, or a key is unknown or given twice, or a value is none that it can have.
    """
    sweep: dict[str, list[Any]] = {}
    key = ""
    for word in ",".join(words).split(",") if words else ():
        name, separator, text = word.strip().partition("=")
        if separator:
            key = name.strip().replace("-", "_")
            if key not in _SWEPT:
                raise ConfigError(f"--sweep: no setting {name.strip()!r} to sweep; there are {', '.join(_SWEPT)}")
            if key in sweep:
                raise ConfigError(f"--sweep: {key} stands there twice; give all its values at once, {key}=A,B")
            sweep[key] = []
        elif not key:
            raise ConfigError(f"--sweep: expected KEY=VALUE[,VALUE...], such as size=704x384,720x400, not {word!r}")
        else:
            text = name
        if not text.strip():
            raise ConfigError(f"--sweep: a value of {key} is empty")
        sweep[key].append(_SWEPT[key](key, text.strip()))
    for key, values in sweep.items():
        if len(set(values)) < len(values):
            raise ConfigError(f"--sweep: a value of {key} stands there twice")
    return sweep


def on_or_off(name: str, text: str) -> bool:
    """True of "on", False of "off".

    Raises:
        ConfigError: it is something else.
    """
    if text not in ("on", "off"):
        raise ConfigError(f"{name} must be on or off, not {text!r}")
    return text == "on"


def _one_of(*choices: str) -> Callable[[str, str], str]:
    def parse(name: str, text: str) -> str:
        if text not in choices:
            raise ConfigError(f"--sweep: {name} must be one of {', '.join(choices)}, not {text!r}")
        return text

    return parse


def _size(name: str, text: str) -> str:
    return exact_size(text)


def _count(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--sweep: {name} must be an integer, not {text!r}") from None


_SWEPT: Mapping[str, Callable[[str, str], Any]] = {
    "size": _size,
    "precision": _one_of("auto", *PRECISIONS),
    "kv_precision": _one_of("auto", *PRECISIONS),
    "steps": _count,
    "schedule": _one_of("sequential", "diagonal"),
    "kv_mode": _one_of("timestep", "clean"),
    "graphs": on_or_off,
    "motion_tokens": on_or_off,
    "preset": _one_of(*PRESETS),
}
"""Settings that can be swept, and how their values are read."""
