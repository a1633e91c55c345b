"""The engine's encoders under the reference's names and signatures, for scripts that call them on their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..conditions.audio_encoder import FEATURE_RATE, features_30hz, pick_columns
from ..conditions.speech import as_samples
from ..config.geometry import FRAMES_PER_SECOND, SPEECH_RATE
from ..errors import ConfigError, InputError

if TYPE_CHECKING:
    from ..pipeline.engine import Engine
    from .backend import Backend

_Loaded = Callable[[], "Engine"]


class TextEncoderView:
    """`pipeline.text_encoder`."""

    def __init__(self, engine: _Loaded, backend: Backend) -> None:
        self._engine, self._backend = engine, backend

    def __call__(self, texts: Sequence[str], device: torch.device) -> list[Tensor]:
        """The context of each text, [tokens, text_dim]."""
        engine = self._engine()
        return [self._backend.context(engine, text).to(device) for text in texts]


class VaeView:
    """`pipeline.vae`: normalised latents, pixels in [-1, 1]."""

    def __init__(self, engine: _Loaded) -> None:
        self._engine = engine

    @property
    def model(self) -> nn.Module:
        return self._engine().encoders.vae

    @property
    def device(self) -> torch.device:
        return self._engine().device

    @property
    def dtype(self) -> torch.dtype:
        """Of latents."""
        return torch.float32

    def encode(self, videos: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """Videos [3, frames, height, width] to latents [channels, 1 + (frames - 1) // 4, height / 8, width / 8]."""
        vae = self._engine().encoders.vae
        return [torch.stack(list(vae.encode(video.float().unbind(1))), dim=1) for video in videos]

    def decode(self, zs: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """Latents [channels, frames, ...] to videos [3, 4 * frames - 3, height, width], float32."""
        vae = self._engine().encoders.vae
        return [vae.decoder_stream().decode(latents.float()) for latents in zs]


class AudioEncoderView:
    """`pipeline.audio_encoder`."""

    video_rate = FEATURE_RATE

    def __init__(self, engine: _Loaded) -> None:
        self._engine = engine

    @property
    def model(self) -> nn.Module:
        return self._engine().encoders.audio.model

    def extract_audio_feat(
        self, audio_path: str | Path, return_all_layers: bool = False, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """States of a sound file at 30 Hz: [layers, features, dim], or [1, features, dim] of the last layer."""
        from ..media.audio import load_speech

        return self.extract_audio_feat_from_array(load_speech(audio_path), SPEECH_RATE, return_all_layers, dtype)

    def extract_audio_feat_from_array(
        self,
        audio_array: np.ndarray,
        sample_rate: int = SPEECH_RATE,
        return_all_layers: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """As `extract_audio_feat`, of samples: float32 or int16 mono at 16 kHz.

        Raises:
            InputError: samples of another kind or rate.
        """
        if sample_rate != SPEECH_RATE:
            raise InputError(f"sample_rate must be {SPEECH_RATE}, not {sample_rate}: resample the audio first")
        features = features_30hz(self._engine().encoders.audio.states(as_samples(audio_array)))
        return (features if return_all_layers else features[-1:]).to(dtype)

    def get_audio_embed_bucket_fps(
        self, audio_embed: Tensor, fps: int = 16, batch_frames: int = 81, m: int = 0
    ) -> tuple[Tensor, int]:
        """States of each video frame, [columns, layers, dim], zero past the end, and how many batches they make.

        Raises:
            ConfigError: `fps` is not 25, or neighbours are asked for (m > 0).
        """
        if fps != FRAMES_PER_SECOND or m:
            raise ConfigError(f"get_audio_embed_bucket_fps: fps must be {FRAMES_PER_SECOND} and m 0, not {fps} and {m}")
        batches = audio_embed.shape[1] * FRAMES_PER_SECOND // (batch_frames * FEATURE_RATE) + 1
        return pick_columns(audio_embed, 0, batches * batch_frames).permute(2, 0, 1), batches
