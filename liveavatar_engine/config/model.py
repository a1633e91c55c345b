"""The network's sizes, as a checkpoint's `config.json` states them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants of a Live Avatar network.

    Names and defaults are those of the reference's `config.json` (the published one omits `text_dim`, `patch_size`,
    `window_size`, `qk_norm` and `cross_attn_norm`). Build one with `from_file`.

    Raises:
        CheckpointError: a size is impossible or a variant is not one this engine runs.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    audio_dim: int
    audio_inject_layers: tuple[int, ...]
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    cond_dim: int = 16
    num_audio_token: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    enable_adain: bool = True
    adain_mode: str = "attn_norm"
    zero_timestep: bool = True
    enable_motioner: bool = False
    enable_framepack: bool = True
    framepack_drop_mode: str = "padd"
    add_last_motion: bool = True
    window_size: tuple[int, int] = (-1, -1)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    audio_layers: int = 25
    """Hidden states of the audio encoder that are averaged; fixed at 25 in the reference's constructor."""

    def __post_init__(self) -> None:
        for name in ("dim", "ffn_dim", "num_heads", "num_layers", "audio_dim", "freq_dim", "text_dim", "text_len"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"config.json: {name} must be at least 1, not {getattr(self, name)}")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise CheckpointError(
                f"config.json: dim {self.dim} must split into {self.num_heads} heads of an even size each"
            )
        if self.dim % 4 or self.freq_dim % 2:
            raise CheckpointError(
                f"config.json: dim {self.dim} must be a multiple of 4 and freq_dim {self.freq_dim} of 2"
            )
        outside = [layer for layer in self.audio_inject_layers if not 0 <= layer < self.num_layers]
        if outside:
            raise CheckpointError(
                f"config.json: audio_inject_layers {outside} lie outside the {self.num_layers} layers"
            )
        self._refuse_other_variants()

    def _refuse_other_variants(self) -> None:
        supported: dict[str, Any] = {
            "patch_size": (1, 2, 2),
            "window_size": (-1, -1),
            "enable_adain": True,
            "adain_mode": "attn_norm",
            "zero_timestep": True,
            "enable_motioner": False,
            "enable_framepack": True,
            "framepack_drop_mode": "padd",
            "add_last_motion": True,
            "qk_norm": True,
            "cross_attn_norm": True,
        }
        for name, expected in supported.items():
            if getattr(self, name) != expected:
                raise CheckpointError(
                    f"config.json: {name}={getattr(self, name)!r} is a variant this engine does not run "
                    f"(Live Avatar has {expected!r})"
                )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def injector_layers(self) -> tuple[int, ...]:
        """Layers followed by an audio injector, in the order in which the checkpoint numbers the injectors."""
        return tuple(sorted(set(self.audio_inject_layers)))

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read a `config.json`; keys of other reference variants that do not change the network are ignored.

        Raises:
            CheckpointError: the file is missing, is not JSON, lacks a size or describes another kind of model.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file (a Live Avatar checkpoint has a config.json)") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path}: expected a JSON object, found a {type(raw).__name__}")
        try:
            return cls(**{f.name: _typed(raw[f.name], f) for f in dataclasses.fields(cls) if f.name in raw})
        except TypeError:
            required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
            missing = ", ".join(name for name in required if name not in raw)
            raise CheckpointError(f"{path}: lacks {missing}: not the config of a Live Avatar network") from None
        except CheckpointError as error:
            raise CheckpointError(str(error).replace("config.json", str(path), 1)) from None

    def to_json(self) -> str:
        """The `config.json` text that `from_file` reads back."""
        entries = {**dataclasses.asdict(self), "_class_name": "WanModel_S2V"}
        entries.pop("audio_layers")
        return json.dumps(entries, indent=1)


def _typed(value: Any, field: dataclasses.Field[Any]) -> Any:
    """`value` as the field's type, or a CheckpointError that names both."""
    kind = str(field.type)
    if kind.startswith("tuple"):
        if isinstance(value, list) and all(isinstance(entry, int) for entry in value):
            return tuple(value)
    elif kind == "float":
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif (
        (kind == "bool" and isinstance(value, bool))
        or (kind == "int" and isinstance(value, int) and not isinstance(value, bool))
        or (kind == "str" and isinstance(value, str))
    ):
        return value
    raise CheckpointError(f"config.json: {field.name} must be a {kind}, not {value!r}")
