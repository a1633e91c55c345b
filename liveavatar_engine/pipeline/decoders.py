"""The decoders of an engine's streams."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..config import StreamGeometry
from ..runtime.graphs import recorder
from ..runtime.timing import StageTimer
from ..vae.block_decoder import BlockDecoder
from ..vae.delivery import FrameDecoder, HostFrames, Pending
from ..vae.vae import DecoderStream, Vae, to_uint8
from .offload import OffloadedVae


class Decoders:
    """Makes a decoder for each stream: over static buffers that all streams of a picture size share.

    A VAE whose weights stay on the host decodes without static buffers, latent by latent.
    """

    def __init__(self, vae: Vae, graphs: bool) -> None:
        self._vae, self._graphs = vae, graphs
        self._lock = threading.Lock()
        self._block: tuple[StreamGeometry, BlockDecoder] | None = None

    def stream(self, geometry: StreamGeometry) -> FrameDecoder:
        """A decoder at the start of a video; the first one of a picture size takes longer."""
        if isinstance(self._vae, OffloadedVae):
            return PlainFrames(self._vae.decoder_stream())
        with self._lock:
            if self._block is None or self._block[0] != geometry:
                self._block = None
                _, latents, rows, columns = geometry.block_shape
                weight = self._vae.conv2.weight
                made = BlockDecoder(self._vae, rows, columns, latents, recorder(weight.device, self._graphs))
                self._block = geometry, made
            return self._block[1].stream()


class PlainFrames:
    """A stream of the plain decoder, as sessions use it."""

    def __init__(self, stream: DecoderStream) -> None:
        self._stream = stream
        self._host: HostFrames | None = None

    def skip(self, latents: Tensor) -> None:
        """Decode latents for the sake of those that follow."""
        self._stream.decode(latents)

    def start(self, latents: Tensor, timer: StageTimer) -> Pending:
        """The frames of the next latents, on their way to the host."""
        with torch.inference_mode(), timer.stage("decode"):
            frames = to_uint8(self._stream.decode(latents))
            if self._host is None:
                self._host = HostFrames(frames.device)
            return self._host.take(frames)

    def close(self) -> None:
        """Nothing is shared."""
