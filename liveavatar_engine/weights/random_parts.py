"""An engine's parts with random weights, made on the device: they need no download.

Weights are drawn tensor by tensor from generators of their own, with the distributions of `make-checkpoint`, which
keep signals near unit variance. There is no random text encoder: a prompt's context is random itself.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..conditions.audio_encoder import AudioEncoder
from ..conditions.text import TextEncoder
from ..config import EngineConfig, StreamGeometry
from ..errors import DeviceMemoryError
from ..model import Network
from ..pipeline.device import Precision
from ..vae.vae import Vae
from .budget import free_memory
from .create import audio_config, distribution
from .memory import PartSizes, gigabytes, predict_memory
from .network import NetworkBuilder
from .presets import Preset
from .tensors import assign

if TYPE_CHECKING:
    from transformers import Wav2Vec2Model

PROMPT_SHARE = 4
"""A random prompt has the network's text_len over this many tokens: 128 of 512, a long prompt."""


_ROWS = {"network": "network", "audio encoder": "audio_encoder", "VAE": "vae"}
"""Rows of a prediction of memory -> the parts that they are of."""


class RandomText(TextEncoder):
    """Stands in for UMT5: a random context, whatever the prompt says."""

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._dim, self._dtype, self._device, self._seed = dim, dtype, device, seed

    def context(self, prompt: str, length: int) -> Tensor:
        """[length / 4, text_dim]."""
        return drawn((prompt_tokens(length), self._dim), 0.0, 1.0, "prompt", self._seed, self._device, self._dtype)


def prompt_tokens(text_len: int) -> int:
    """Tokens of a random prompt."""
    return max(1, text_len // PROMPT_SHARE)


class RandomParts:
    """What an engine is made of, at a preset's sizes; each part is made when it is first asked for.

    The same seed gives the same parts on the same kind of device.
    """

    def __init__(self, preset: Preset, precision: Precision, device: torch.device, seed: int) -> None:
        self._preset, self._precision, self._device, self._seed = preset, precision, device, seed

    def require_memory(self, geometry: StreamGeometry, config: EngineConfig) -> None:
        """Compare what an engine for such streams still needs with what is free.

        Raises:
            DeviceMemoryError: it will not fit; the error holds the table.
        """
        estimate = predict_memory(geometry, random_sizes(self._preset), config, self._device)
        held = sum(row.bytes for row in estimate.rows if _ROWS.get(row.name) in self.__dict__)
        free = free_memory(self._device)
        if free is not None and estimate.total - held > free:
            there = f" beside {gigabytes(held)} that are there" if held else ""
            raise DeviceMemoryError(
                f"{self._device}: this needs {gigabytes(estimate.total - held)} of memory{there}, {gigabytes(free)} "
                f"are free\n{estimate.table()}"
            )

    @cached_property
    def network(self) -> Network:
        return _random_network(self._preset, self._precision, self._device, self._seed)

    @cached_property
    def vae(self) -> Vae:
        return _random_vae(self._preset, self._precision.decoder, self._device, self._seed)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        return RandomText(self._preset.model.text_dim, self._precision.dtype, self._device, self._seed)

    @cached_property
    def audio_encoder(self) -> AudioEncoder:
        return _random_audio_encoder(self._preset, self._device, self._seed)


def random_sizes(preset: Preset) -> PartSizes:
    """For a prediction of memory; there is no text encoder."""
    audio = {name: tuple(parameter.shape) for name, parameter in _empty_audio_encoder(preset).named_parameters()}
    return PartSizes.of({name: tuple(t.shape) for name, t in _empty_vae(preset).state_dict().items()}, {}, audio)


def _empty_vae(preset: Preset) -> Vae:
    with torch.device("meta"):
        return Vae(preset.vae).eval().requires_grad_(False)


def _empty_audio_encoder(preset: Preset) -> Wav2Vec2Model:
    from transformers import Wav2Vec2Model

    with torch.device("meta"):
        return Wav2Vec2Model(audio_config(preset)).eval().requires_grad_(False)


def _random_network(preset: Preset, precision: Precision, device: torch.device, seed: int) -> Network:
    """Tensor by tensor, each in its final form before the next is drawn."""
    builder = NetworkBuilder(preset.model, precision.dtype, device, precision.fp8_skip)
    for name, shape in builder.shapes.items():
        builder.put(name, drawn(shape, *distribution(name, shape), name, seed, device, precision.dtype))
    return builder.network


@torch.inference_mode()
def _random_vae(preset: Preset, dtype: torch.dtype, device: torch.device, seed: int) -> Vae:
    vae = _empty_vae(preset)
    for name, tensor in vae.state_dict().items():
        decodes = name.startswith(("decoder.", "conv2."))
        _assign_random(vae, name, tensor, seed, device, dtype if decodes else torch.float32)
    return vae


@torch.inference_mode()
def _random_audio_encoder(preset: Preset, device: torch.device, seed: int) -> AudioEncoder:
    model = _empty_audio_encoder(preset)
    for name, parameter in model.named_parameters():
        _assign_random(model, name, parameter, seed, device, torch.float32)
    return AudioEncoder(model, normalize=True)


def _assign_random(
    module: nn.Module, name: str, like: Tensor, seed: int, device: torch.device, dtype: torch.dtype
) -> None:
    assign(module, name, drawn(like.shape, *distribution(name, tuple(like.shape)), name, seed, device, dtype))


def drawn(
    shape: tuple[int, ...],
    mean: float,
    deviation: float,
    name: str,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A normal tensor that depends on seed, name and shape."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.empty(shape, device=device).normal_(mean, deviation, generator=generator).to(dtype)
