"""Where things lie in a checkpoint directory; the names are the reference's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError

CONFIG = "config.json"
NETWORK = "diffusion_pytorch_model"
VAE = "Wan2.1_VAE.pth"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"
AUDIO_ENCODER = "wav2vec2-large-xlsr-53-english"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory, complete as far as its files go.

    Raises:
        CheckpointError: the directory is not there, or lacks a part; all missing parts are named at once.
    """

    root: Path

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            what = "is a file, not a directory" if self.root.exists() else "no such directory"
            raise CheckpointError(f"{self.root}: {what} (expected a checkpoint such as Wan2.2-S2V-14B)")
        missing = self.missing_parts()
        if missing:
            raise CheckpointError(
                f"{self.root}: not a complete Live Avatar checkpoint, it lacks\n  " + "\n  ".join(missing)
            )

    @property
    def config(self) -> Path:
        return self.root / CONFIG

    @property
    def vae(self) -> Path:
        return self.root / VAE

    @property
    def text_encoder(self) -> Path:
        return self.root / TEXT_ENCODER

    @property
    def tokenizer(self) -> Path:
        return self.root / TOKENIZER

    @property
    def audio_encoder(self) -> Path:
        return self.root / AUDIO_ENCODER

    def missing_parts(self) -> list[str]:
        """Parts that are not there, each with what it is for."""
        return missing_parts(self.root)


def missing_parts(root: Path) -> list[str]:
    """Parts of a checkpoint that `root` does not hold, each with what it is for."""
    wanted = {
        CONFIG: (root / CONFIG).is_file(),
        f"{NETWORK}*.safetensors (network)": any(root.glob(f"{NETWORK}*.safetensors")),
        f"{VAE} (VAE)": (root / VAE).is_file(),
        f"{TEXT_ENCODER} (text encoder)": (root / TEXT_ENCODER).is_file(),
        f"{TOKENIZER}/ (tokenizer: spiece.model or tokenizer.json)": _has_tokenizer(root / TOKENIZER),
        f"{AUDIO_ENCODER}/config.json (audio encoder)": (root / AUDIO_ENCODER / "config.json").is_file(),
        f"{AUDIO_ENCODER}/preprocessor_config.json (audio encoder)": (
            root / AUDIO_ENCODER / "preprocessor_config.json"
        ).is_file(),
        f"{AUDIO_ENCODER}/model.safetensors or pytorch_model.bin (audio encoder)": any(
            (root / AUDIO_ENCODER / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")
        ),
    }
    return [part for part, present in wanted.items() if not present]


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file() and any(
        (folder / name).is_file() for name in ("spiece.model", "tokenizer.json")
    )
