"""Parts of an engine whose weights stay in host memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from ..config import EngineConfig
from ..vae.shape import VaeShape
from ..vae.vae import DecoderStream, Vae, load_vae
from ..weights.offload import CudaFetcher, Fetcher, HostWeights, Visit


def fetchers(config: EngineConfig, device: torch.device) -> dict[str, Fetcher]:
    """What brings the weights of offloaded parts to the device, by part; nothing is offloaded from a CPU."""
    parts = offloaded_parts(config, device)
    return dict.fromkeys(parts, CudaFetcher(device)) if parts else {}


def offloaded_parts(config: EngineConfig, device: torch.device) -> tuple[str, ...]:
    """The parts whose weights stay in host memory."""
    return config.offload if device.type == "cuda" else ()


def load_offloadable_vae(path: Path, dtype: torch.dtype, device: torch.device, fetcher: Fetcher | None) -> Vae:
    """`load_vae`; with a fetcher, weights stay in host memory."""
    if fetcher is None:
        return load_vae(path, dtype, device)
    return OffloadedVae.of(load_vae(path, dtype, torch.device("cpu")), fetcher)


class OffloadedVae(Vae):
    """A VAE whose encoder and decoder are on the device only while they work."""

    _encoding: Visit
    _decoding: Visit

    @classmethod
    def of(cls, vae: Vae, fetcher: Fetcher) -> Self:
        """Take over the weights of a VAE in host memory."""
        state = vae.state_dict()
        with torch.device("meta"):
            offloaded = cls(VaeShape.of_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}))
        offloaded.load_state_dict(state, assign=True)
        offloaded.eval().requires_grad_(False)
        encoder, decoder = (offloaded.encoder, offloaded.conv1), (offloaded.decoder, offloaded.conv2)
        offloaded._encoding, offloaded._decoding = (
            Visit(HostWeights(nn.ModuleList(modules), fetcher)) for modules in (encoder, decoder)
        )
        return offloaded

    def encode(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        with self._encoding:
            yield from super().encode(frames)

    def encode_still(self, image: Tensor, latents: int) -> Tensor:
        with self._encoding:
            return super().encode_still(image, latents)

    def decoder_stream(self) -> DecoderStream:
        return _OffloadedDecoderStream(self, self._decoding)


class _OffloadedDecoderStream(DecoderStream):
    def __init__(self, vae: Vae, decoding: Visit) -> None:
        super().__init__(vae)
        self._decoding = decoding

    def decode(self, latents: Tensor) -> Tensor:
        with self._decoding:
            return super().decode(latents)
