"""What tests of the pipeline classes call them with."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from support import speech, write_wav
from torch import Tensor

from liveavatar_engine.compat.base import Pipeline
from liveavatar_engine.media.audio import load_speech


def reference_config(**changes: Any) -> SimpleNamespace:
    """A configuration with the names of the reference's, for the golden checkpoint."""
    settings = {
        "num_train_timesteps": 1000,
        "num_frames_per_block": 3,
        "param_dtype": torch.float32,
        "text_len": 12,
        "t5_checkpoint": "models_t5_umt5-xxl-enc-bf16.pth",
        "t5_tokenizer": "google/umt5-xxl",
        "vae_checkpoint": "Wan2.1_VAE.pth",
        "sample_solver": "unipc",
        "sample_neg_prompt": "blurred",
        "sample_fps": 25,
        "drop_first_motion": True,
        "transformer": SimpleNamespace(motion_frames=73),
    }
    return SimpleNamespace(**{**settings, **changes})


class Files:
    """A portrait of 64x64 and speech of 2.2 s, two clips."""

    def __init__(self, folder: Path, face: np.ndarray) -> None:
        self.image, self.audio = folder / "face.png", folder / "speech.wav"
        Image.fromarray(face).save(self.image)
        self.samples = speech(2.2)
        write_wav(self.audio, self.samples)

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Arguments of `generate` as scripts of the reference pass them, of a size that is small."""
        settings = {
            "input_prompt": "a person talks",
            "ref_image_path": str(self.image),
            "audio_path": str(self.audio),
            "num_repeat": None,
            "generate_size": "64*64",
            "max_area": 64 * 64,
            "infer_frames": 48,
            "shift": 3,
            "sample_solver": "euler",
            "sampling_steps": 2,
            "guide_scale": 0,
            "seed": 7,
            "offload_model": True,
        }
        return {**settings, **changes}


class LiveSource:
    """A callback that gives a file's samples in chunks of these sizes, in turn, and None behind the last."""

    def __init__(self, audio: str | Path, *sizes: int) -> None:
        self._samples, self._sizes = load_speech(audio), itertools.cycle(sizes)

    def __call__(self) -> np.ndarray | None:
        size = next(self._sizes)
        chunk, self._samples = self._samples[:size], self._samples[size:]
        return chunk if len(chunk) else None


def observed(pipeline: Pipeline) -> dict[int, Tensor]:
    """The latents of blocks that the pipeline makes from now on."""
    seen: dict[int, Tensor] = {}
    pipeline.observe = lambda block, latents: seen.update({block: latents.clone()})
    return seen
