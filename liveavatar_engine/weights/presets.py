"""Sizes of the checkpoints that `create` makes: the only place where a model's sizes stand in the code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..config import ModelConfig
from ..errors import ConfigError
from ..vae.shape import VaeShape
from .tokenizer import VOCABULARY

_WAV2VEC2_LAYERS = 24
"""One less than the hidden states that the reference averages."""


@dataclass(frozen=True)
class TextEncoderSizes:
    """Sizes of a UMT5 encoder, whose width is the network's `text_dim`.

    Attributes:
        vocabulary: rows of the token embedding.
        layers, heads, head_dim, ffn_dim: as their names say.
        dtype: on disk.
        buckets: of the relative positions.
    """

    vocabulary: int
    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    dtype: torch.dtype = torch.float32
    buckets: int = 32


@dataclass(frozen=True)
class AudioEncoderSizes:
    """Sizes of a wav2vec2 encoder, float32, whose width is the network's `audio_dim`.

    Attributes:
        heads, ffn_dim, layers: of its transformer.
        conv_dim: channels of each of the seven convolutions over the waveform.
        position_kernel, position_groups: of the convolution that encodes positions.
    """

    heads: int
    ffn_dim: int
    conv_dim: int
    position_kernel: int
    position_groups: int
    layers: int = _WAV2VEC2_LAYERS


@dataclass(frozen=True)
class Preset:
    """A kind of checkpoint.

    Attributes:
        name: as users ask for it.
        model: the network's `config.json`.
        vae, text, audio: sizes of the parts around the network.
        dtype: of the network's tensors on disk.
        shard_bytes: most bytes of tensors in a file of the network.

    Raises:
        ConfigError: the parts do not fit together.
    """

    name: str
    model: ModelConfig
    vae: VaeShape
    text: TextEncoderSizes
    audio: AudioEncoderSizes
    dtype: torch.dtype
    shard_bytes: int

    def __post_init__(self) -> None:
        if self.audio.layers + 1 != self.model.audio_layers:
            raise ConfigError(
                f"preset {self.name}: {self.audio.layers} audio layers give {self.audio.layers + 1} hidden states, "
                f"the network averages {self.model.audio_layers}"
            )
        if self.text.vocabulary < VOCABULARY:
            raise ConfigError(
                f"preset {self.name}: the tokenizer needs a vocabulary of {VOCABULARY}, not {self.text.vocabulary}"
            )


_TINY = Preset(
    name="tiny",
    model=ModelConfig(
        dim=64,
        ffn_dim=128,
        num_heads=2,
        num_layers=3,
        freq_dim=32,
        text_dim=32,
        text_len=32,
        audio_dim=16,
        audio_inject_layers=(0, 2),
    ),
    vae=VaeShape.wan21(width=4),
    text=TextEncoderSizes(vocabulary=512, layers=2, heads=4, head_dim=8, ffn_dim=64),
    audio=AudioEncoderSizes(heads=2, ffn_dim=32, conv_dim=8, position_kernel=16, position_groups=2),
    dtype=torch.float32,
    shard_bytes=10**9,
)

_SMALL = Preset(
    name="small",
    model=ModelConfig(
        dim=512,
        ffn_dim=1536,
        num_heads=4,
        num_layers=8,
        freq_dim=256,
        text_dim=512,
        text_len=128,
        audio_dim=256,
        audio_inject_layers=(0, 2, 4, 7),
    ),
    vae=VaeShape.wan21(width=32),
    text=TextEncoderSizes(vocabulary=4096, layers=4, heads=8, head_dim=64, ffn_dim=1024),
    audio=AudioEncoderSizes(heads=4, ffn_dim=1024, conv_dim=128, position_kernel=128, position_groups=16),
    dtype=torch.float32,
    shard_bytes=10**8,
)

_14B = Preset(
    name="14b",
    model=ModelConfig(
        dim=5120,
        ffn_dim=13824,
        num_heads=40,
        num_layers=40,
        freq_dim=256,
        text_dim=4096,
        text_len=512,
        audio_dim=1024,
        audio_inject_layers=(0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
    ),
    vae=VaeShape.wan21(),
    text=TextEncoderSizes(vocabulary=256384, layers=24, heads=64, head_dim=64, ffn_dim=10240, dtype=torch.bfloat16),
    audio=AudioEncoderSizes(heads=16, ffn_dim=4096, conv_dim=512, position_kernel=128, position_groups=16),
    dtype=torch.bfloat16,
    shard_bytes=10**10,
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in (_TINY, _SMALL, _14B)})
"""By name: "tiny" runs anywhere at once, "small" is worth profiling on a CPU, "14b" has Live Avatar's own sizes."""
