"""Weights and inputs that each side makes for itself, alike to the bit: from names and a seed, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...config import StreamGeometry
from ...config.geometry import MOTION_LATENTS
from ...denoise.noise import BlockNoise
from ...weights.create import distribution
from ...weights.layout import NETWORK
from ...weights.lora import LoraAdapter
from ...weights.network import network_shapes
from ...weights.random_parts import drawn, prompt_tokens
from ...weights.tensors import TensorStore, check_names_and_shapes
from ..settings import Settings

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class StreamInputs:
    """What a stream is made from: float32 on the CPU, each value one of the dtype that it was made for.

    Attributes:
        context: of the prompt, [tokens, text_dim].
        reference: latent of the image, [channels, 1, latent_height, latent_width].
        motion: motion latents, [channels, 19, latent_height, latent_width].
        noise: per block, [channels, frames, latent_height, latent_width].
        audio: per block, wav2vec2 states [1, audio_layers, audio_dim, columns].
    """

    context: Tensor
    reference: Tensor
    motion: Tensor
    noise: tuple[Tensor, ...]
    audio: tuple[Tensor, ...]

    @classmethod
    def draw(cls, geometry: StreamGeometry, blocks: int, seed: int, dtype: torch.dtype) -> StreamInputs:
        """Random ones for a stream of so many blocks, rounded to `dtype`."""
        model = geometry.model
        channels, _, height, width = geometry.block_shape
        noise = BlockNoise(geometry, seed)

        def rounded(tensor: Tensor) -> Tensor:
            return tensor.to(dtype).float()

        def normal(name: str, *shape: int) -> Tensor:
            return rounded(drawn(shape, 0.0, 1.0, name, seed, _CPU))

        states = (1, model.audio_layers, model.audio_dim, geometry.columns_per_block)
        return cls(
            context=normal("context", prompt_tokens(model.text_len), model.text_dim),
            reference=normal("reference", channels, 1, height, width),
            motion=normal("motion", channels, MOTION_LATENTS, height, width),
            noise=tuple(rounded(noise.block(block)) for block in range(blocks)),
            audio=tuple(normal(f"audio {block}", *states) for block in range(blocks)),
        )


def weights(settings: Settings, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight of the network, one by one, in `dtype` on `device`.

    Raises:
        CheckpointError: the checkpoint or the adapter is missing, damaged or of another model.
    """
    shapes = network_shapes(settings.model())
    adapter = None if settings.lora is None else LoraAdapter.from_file(Path(settings.lora), shapes)
    stored = _random(shapes, settings.seed, device)
    if settings.checkpoint is not None:
        stored = _stored(Path(settings.checkpoint), shapes, device)
    for name, tensor in stored:
        if adapter is not None and name in adapter.down:
            tensor = torch.cat([rows for _, rows in adapter.merged(name, tensor)])
        yield name, tensor.to(dtype)


def _random(shapes: dict[str, tuple[int, ...]], seed: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        yield name, drawn(shape, *distribution(name, shape), name, seed, device)


def _stored(checkpoint: Path, shapes: dict[str, tuple[int, ...]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    store = TensorStore.of_model(checkpoint, NETWORK)
    check_names_and_shapes(checkpoint, shapes, {name: info.shape for name, info in store.tensors.items()})
    with closing(store.read(device)) as tensors:
        yield from tensors
