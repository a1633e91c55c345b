"""Speech to hidden states, through transformers' wav2vec2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers  # its classes take seconds to import: it does so when one is used
from torch import Tensor
from torch.nn import functional as F

from ..config.geometry import FRAMES_PER_SECOND, SPEECH_RATE
from ..errors import CheckpointError
from ..weights.tensors import listed

STATE_RATE = 50
"""wav2vec2 states per second."""
FEATURE_RATE = 30
"""Rate to which the reference interpolates the states before it picks columns."""
SAMPLES_PER_STATE = SPEECH_RATE // STATE_RATE
_MIN_SAMPLES = 3 * SAMPLES_PER_STATE
"""Shorter speech is padded with silence: fewer than two states cannot be interpolated."""
_VARIANCE_EPS = 1e-7
_TRAINING_ONLY = {"wav2vec2.masked_spec_embed"}


@dataclass
class AudioEncoder:
    """wav2vec2 of a checkpoint; every state it hands out is float32."""

    model: transformers.Wav2Vec2Model
    normalize: bool

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> AudioEncoder:
        """Load `folder`, never from the network. The encoder runs in float32.

        Raises:
            CheckpointError: files are missing or damaged, or the sampling rate is another one.
        """
        preprocessor = folder / "preprocessor_config.json"
        try:
            settings = json.loads(preprocessor.read_text(encoding="utf-8"))
            rate, normalize = int(settings["sampling_rate"]), bool(settings["do_normalize"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{preprocessor}: missing or not a feature extractor's settings: {error}") from error
        if rate != SPEECH_RATE:
            raise CheckpointError(f"{preprocessor}: sampling rate {rate}, expected {SPEECH_RATE}")
        try:
            with _no_progress_bar():
                loaded: Any = transformers.Wav2Vec2ForCTC.from_pretrained(
                    folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
                )
        except Exception as error:  # transformers and its backends raise many types for a damaged folder
            raise CheckpointError(f"{folder}: not a usable wav2vec2 model: {error}") from error
        model, report = loaded
        if wrong := sorted({*map(str, report["missing_keys"]), *map(str, report["mismatched_keys"])} - _TRAINING_ONLY):
            raise CheckpointError(f"{folder}: tensors missing or of another shape: {listed(wrong)}")
        return cls(model.wav2vec2.eval().requires_grad_(False).to(device), normalize)

    @property
    def state_count(self) -> int:
        """Hidden states per moment: the embedding and one per layer."""
        return self.model.config.num_hidden_layers + 1

    @property
    def state_dim(self) -> int:
        return self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.inference_mode()
    def states(self, speech: np.ndarray) -> Tensor:
        """Hidden states at 50 Hz: float32 [samples] at 16 kHz -> float32 [state_count, moments, state_dim].

        The embedding output, all layers but the last, and `last_hidden_state`, which is behind the final LayerNorm.
        The speech is normalised as a whole where the checkpoint asks for it.
        """
        speech = np.pad(speech.astype(np.float32), (0, max(0, _MIN_SAMPLES - len(speech))))
        return self.encode(torch.from_numpy(self.normalized(speech)).to(self.device))

    def normalized(self, speech: np.ndarray) -> np.ndarray:
        """Float32 [samples] with mean 0 and variance 1, where the checkpoint asks for it."""
        return (speech - speech.mean()) / np.sqrt(speech.var() + _VARIANCE_EPS) if self.normalize else speech

    def encode(self, speech: Tensor) -> Tensor:
        """As `states`, of normalised samples on the encoder's device."""
        output = self.model(speech[None], output_hidden_states=True)
        return torch.cat((*output.hidden_states[: self.state_count - 1], output.last_hidden_state))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar on the caller's terminal."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def state_moments(samples: int) -> int:
    """How many states wav2vec2 makes of `samples`: one per 320 samples, each seeing 400."""
    return max(0, (samples - 400) // SAMPLES_PER_STATE + 1)


def features_30hz(states: Tensor) -> Tensor:
    """Interpolate [layers, moments, dim] from 50 to 30 Hz, ends aligned: length int(moments / 50 * 30)."""
    length = int(states.shape[1] / STATE_RATE * FEATURE_RATE)
    resampled = F.interpolate(states.transpose(1, 2), size=length, mode="linear", align_corners=True)
    return resampled.transpose(1, 2)


def feature_index(column: int) -> int:
    """The 30 Hz feature that belongs to a video frame: round(1.2 * column)."""
    return (2 * FEATURE_RATE * column + FRAMES_PER_SECOND) // (2 * FRAMES_PER_SECOND)


def pick_columns(features: Tensor, first: int, count: int) -> Tensor:
    """Columns of `count` video frames, zero past the end: [layers, length, dim] -> [layers, dim, count]."""
    layers, length, dim = features.shape
    columns = features.new_zeros(layers, dim, count)
    for column in range(count):
        index = feature_index(first + column)
        if index < length:
            columns[:, :, column] = features[:, index]
    return columns
