"""What encodes the conditions of streams: pictures, prompts and speech."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from ..conditions.audio_encoder import AudioEncoder
from ..conditions.text import TextEncoder
from ..config import EngineConfig, ModelConfig
from ..errors import CheckpointError
from ..vae.vae import Vae
from ..weights.layout import Checkpoint
from .device import resolve_precision
from .offload import fetchers, load_offloadable_vae


@dataclass(frozen=True)
class Encoders:
    """Loaded ones, on one device; `vae` also has a decoder."""

    vae: Vae
    text: TextEncoder
    audio: AudioEncoder

    @classmethod
    def load(cls, found: Checkpoint, config: EngineConfig, device: torch.device) -> Self:
        """Load a checkpoint's encoders.

        Raises:
            CheckpointError: a part is damaged, or does not fit the network.
        """
        precision, offload = resolve_precision(config, device), fetchers(config, device)
        audio = AudioEncoder.load(found.audio_encoder, device)
        model = ModelConfig.from_file(found.config)
        sizes = (audio.state_count, audio.state_dim)
        if sizes != (model.audio_layers, model.audio_dim):
            raise CheckpointError(
                f"{found.audio_encoder}: {sizes[0]} states of {sizes[1]}; the network was made for "
                f"{model.audio_layers} of {model.audio_dim}"
            )
        text = TextEncoder.load(
            found.text_encoder, found.tokenizer, precision.dtype, device, offload.get("text_encoder")
        )
        return cls(load_offloadable_vae(found.vae, precision.decoder, device, offload.get("vae")), text, audio)
