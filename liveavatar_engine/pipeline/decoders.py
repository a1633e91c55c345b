"""The decoders of an engine's streams."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..config import StreamGeometry
from ..runtime.graphs import recorder
from ..runtime.timing import StageTimer
from ..vae.block_decoder import BlockDecoder
from ..vae.delivery import Delivery, DeviceFrames, FrameDecoder, HostFrames, Pending
from ..vae.light import LightDecoder
from ..vae.vae import DecoderStream, Vae, to_uint8
from .offload import OffloadedVae


class Decoders:
    """Makes a decoder for each stream: over static buffers that all streams of a picture size share.

    A VAE whose weights stay on the host decodes without static buffers, latent by latent.
    """

    def __init__(self, vae: Vae | LightDecoder, device: torch.device, graphs: bool, frames: str) -> None:
        self._vae, self._device, self._graphs = vae, device, graphs
        self._delivery: Delivery = DeviceFrames() if frames == "device" else HostFrames(device)
        self._lock = threading.Lock()
        self._block: tuple[StreamGeometry, BlockDecoder] | None = None

    def stream(self, geometry: StreamGeometry) -> FrameDecoder:
        """A decoder at the start of a video; the first one of a picture size takes longer."""
        if isinstance(self._vae, OffloadedVae):
            return PlainFrames(self._vae.decoder_stream(), self._delivery)
        with self._lock:
            if self._block is None or self._block[0] != geometry:
                self._block = None
                _, latents, rows, columns = geometry.block_shape
                record_with = recorder(self._device, self._graphs)
                made = BlockDecoder(self._vae, rows, columns, latents, record_with, delivery=self._delivery)
                self._block = geometry, made
            return self._block[1].stream()


class PlainFrames:
    """A stream of the plain decoder, as sessions use it."""

    def __init__(self, stream: DecoderStream, delivery: Delivery) -> None:
        self._stream, self._delivery = stream, delivery

    def skip(self, latents: Tensor) -> None:
        """Decode latents for the sake of those that follow."""
        self._stream.decode(latents)

    def check(self) -> None:
        """Nothing is told of it."""

    def start(self, latents: Tensor, timer: StageTimer) -> Pending:
        """The frames of the next latents, on their way."""
        with torch.inference_mode(), timer.stage("decode"):
            return self._delivery.take(to_uint8(self._stream.decode(latents)))

    def close(self) -> None:
        """Nothing is shared."""
