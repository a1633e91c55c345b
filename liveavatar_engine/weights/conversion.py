"""What `convert` notes down in a checkpoint, and what follows from it for those who load it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import EngineConfig, ModelConfig
from ..config.engine import REFERENCE_FP8_SKIP
from ..errors import CheckpointError, ConfigError
from .layout import CONFIG

NOTE = "liveavatar_engine"
"""Key of the note in `config.json` and in the metadata of the network's shards."""
PRECISIONS = ("bf16", "fp8")
_FORMAT, _VERSION = "converted checkpoint", 1


@dataclass(frozen=True)
class MergedLora:
    """An adapter that is merged into the weights: its file's name and hash, and alpha / rank."""

    file: str
    sha256: str
    scale: float


@dataclass(frozen=True)
class Conversion:
    """How a checkpoint was converted.

    Attributes:
        precision: "bf16" or "fp8" (linear layers in e4m3, all else as with bf16).
        fp8_skip: parts of the names of linear layers that are not in e4m3; empty with "bf16".
        lora: the adapter that is merged, or None.
    """

    precision: str
    fp8_skip: tuple[str, ...] = ()
    lora: MergedLora | None = None

    @classmethod
    def of(cls, folder: Path) -> Conversion | None:
        """The note in a checkpoint's `config.json`; None: it is an original.

        Raises:
            CheckpointError: `config.json` cannot be used, or the note was not made by this version's format.
        """
        path = folder / CONFIG
        ModelConfig.from_file(path)
        note = json.loads(path.read_text(encoding="utf-8")).get(NOTE)
        return None if note is None else cls._of_note(path, note)

    @classmethod
    def _of_note(cls, path: Path, note: Any) -> Conversion:
        try:
            stated = note["format"], note["version"]
            lora = None if note["lora"] is None else MergedLora(**note["lora"])
            found = cls(str(note["precision"]), tuple(map(str, note["fp8_skip"])), lora)
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: {NOTE}: not a note of how the checkpoint was converted: {error}") from None
        if stated != (_FORMAT, _VERSION) or found.precision not in PRECISIONS:
            raise CheckpointError(
                f"{path}: {NOTE}: {stated[0]} {stated[1]} in {found.precision}; this version reads {_FORMAT} "
                f"{_VERSION} in {' or '.join(PRECISIONS)}"
            )
        return found

    @property
    def note(self) -> dict[str, Any]:
        """What `of` reads back."""
        return {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(self)}

    @property
    def metadata(self) -> dict[str, str]:
        """The note for the metadata of a safetensors file."""
        return {NOTE: json.dumps(self.note, sort_keys=True)}

    def check(self, folder: Path, lora: Path | None, fp8_skip: tuple[str, ...] | None) -> None:
        """Compare with what is asked for: an adapter to merge, and the layers to keep out of e4m3 (None: all).

        Raises:
            ConfigError: the checkpoint has been converted to something else.
        """
        if lora is not None and self.lora is not None:
            raise ConfigError(f"{folder}: {self.lora.file} is merged into it already; load it without a LoRA ({lora})")
        if self.precision != "fp8":
            return
        if lora is not None:
            raise ConfigError(f"{folder}: converted to fp8, which no LoRA can be merged into ({lora}); convert again")
        if fp8_skip is None:
            raise ConfigError(f"{folder}: converted to fp8: the precision must be fp8 or auto")
        if set(fp8_skip) != set(self.fp8_skip):
            raise ConfigError(
                f"{folder}: converted with fp8_skip {_listed(self.fp8_skip)}, not {_listed(fp8_skip)}; leave it out, "
                "or convert again"
            )

    def __str__(self) -> str:
        lora = "" if self.lora is None else f", {self.lora.file} merged (sha256 {self.lora.sha256[:12]})"
        skip = f", all linear layers but {_listed(self.fp8_skip)}" if self.precision == "fp8" else ""
        return f"converted to {self.precision}{skip}{lora}"


def settled(config: EngineConfig, folder: Path, lora: Path | None) -> EngineConfig:
    """The configuration with what a converted checkpoint decides in place of its defaults.

    In a checkpoint in fp8, precision "auto" is fp8, and the default skip list is the one it was converted with.

    Raises:
        CheckpointError: `config.json` cannot be used.
        ConfigError: the configuration or the adapter contradicts the checkpoint.
    """
    conversion = Conversion.of(folder)
    if conversion is None:
        return config
    fp8 = conversion.precision == "fp8"
    skip = conversion.fp8_skip if fp8 and config.fp8_skip == REFERENCE_FP8_SKIP else config.fp8_skip
    conversion.check(folder, lora, skip if config.precision in ("auto", "fp8") else None)
    return dataclasses.replace(config, precision="fp8", fp8_skip=conversion.fp8_skip) if fp8 else config


def _listed(skip: tuple[str, ...]) -> str:
    return ",".join(skip) or "none"
