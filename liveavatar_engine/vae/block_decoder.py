"""Decodes streams of one picture size from static buffers, a few latents at a time, as recorded work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from liveavatar_kernels.causal_conv3d import causal_conv3d
from torch import Tensor

from ..errors import ModelError
from ..runtime.graphs import Recorder, Work
from ..runtime.timing import StageTimer
from .delivery import Delivery, HostFrames, Parts, Pending
from .fused import (
    CausalInput,
    FusedConvolution,
    FusedFrameAttention,
    FusedOutput,
    FusedResidualBlock,
    FusedUpsample,
    Level,
    Sum,
)
from .layers import FrameAttention, ResidualBlock, Upsample
from .light import LightDecoder
from .light_layers import LightNetwork
from .vae import FRAMES_PER_STEP, LATENT_MEAN, LATENT_STD, Vae

_RGB = 3


class BlockDecoder:
    """A decoder over static buffers; streams take turns, each with a history of its own.

    Attributes:
        dtype: that it computes in.

    Args:
        vae: whose decoder it is, or a light one; parameters are shared.
        rows, columns: of a latent.
        latents: most that are decoded in one call; chunks are calls of so many, and calls of one.
        recorder: how work is recorded.
        dtype: of the result: uint8 for frames as they are shown, or the decoder's, for values in [-1, 1].
        delivery: what takes frames out of the buffers; None: to the host.
    """

    def __init__(
        self,
        vae: Vae | LightDecoder,
        rows: int,
        columns: int,
        latents: int,
        recorder: Recorder,
        dtype: torch.dtype = torch.uint8,
        delivery: Delivery | None = None,
    ) -> None:
        self._recorder, self._most = recorder, latents
        level = Level(latents, rows, columns)
        self._network: LightNetwork | _Network
        if isinstance(vae, LightDecoder):
            self._network, statistics = LightNetwork(vae, level), vae.statistics
        else:
            self._network, statistics = _Network(vae, level), (LATENT_MEAN, LATENT_STD)
        device = self._network.device
        self._lock = threading.Lock()
        self._owner: FrameStream | None = None
        self._latents = torch.zeros(len(LATENT_MEAN), latents, rows, columns, device=device)
        self._mean, self._std = (torch.tensor(values, device=device)[:, None, None, None] for values in statistics)
        shape = (FRAMES_PER_STEP * latents, 8 * rows, 8 * columns, _RGB)
        self._frames = torch.zeros(shape, dtype=dtype, device=device)
        self._work: dict[tuple[int, bool], Work] = {}
        self.dtype = vae.dtype if isinstance(vae, LightDecoder) else vae.conv2.weight.dtype
        self.delivery = delivery or HostFrames(device)

    def warm_up(self) -> None:
        """Record a video's first latent, single latents and whole chunks."""
        with self._lock, torch.inference_mode(), self._recorder.stream():
            if self._work:
                return
            for latents, first in dict.fromkeys(((1, True), (1, False), (self._most, False))):
                self._work[latents, first] = self._recorder.record(self.work_of(latents, first))

    def stream(self) -> FrameStream:
        """A decoder at the start of a video."""
        self.warm_up()
        return FrameStream(self)

    @property
    def history(self) -> list[Tensor]:
        """What convolutions look back to."""
        return [each.history for each in self._network.inputs]

    @property
    def bytes(self) -> int:
        """Memory of the buffers, and of the weights in the order in which convolutions read them."""
        return self._latents.nbytes + self._frames.nbytes + self._network.bytes

    @property
    def history_bytes(self) -> int:
        """Memory of the history of a stream while another one decodes."""
        return sum(part.nbytes for part in self.history)

    @contextmanager
    def turn(self, stream: FrameStream, *, callers_wait: bool = True) -> Iterator[Recorder]:
        """A stream's time: its history is in the buffers, and nobody else uses them."""
        with self._lock, torch.inference_mode(), self._recorder.stream(callers_wait=callers_wait):
            self._let_in(stream)
            yield self._recorder

    def run(self, stream: FrameStream, latents: Tensor) -> Iterator[Tensor]:
        """Decode a stream's next latents in its turn: frames in a buffer that is used again after each call."""
        start = 0
        while start < latents.shape[1]:
            first = not stream.started
            whole = not first and latents.shape[1] - start >= self._most
            count = self._most if whole else 1
            self._latents[:, :count].copy_(latents[:, start : start + count])
            self._work[count, first]()
            stream.started, start = True, start + count
            yield self._frames[: 1 if first else FRAMES_PER_STEP * count]

    def _let_in(self, stream: FrameStream) -> None:
        """Bring a stream's history into the buffers, and put away that of the stream before it."""
        if self._owner is stream:
            return
        if self._owner is not None and not self._owner.closed:
            self._owner.kept = [part.clone() for part in self.history]
        for index, part in enumerate(self.history):
            if stream.kept is None:
                part.zero_()
            else:
                part.copy_(stream.kept[index])
        stream.kept, self._owner = None, stream

    def work_of(self, latents: int, first: bool) -> Work:
        made = 1 if first else FRAMES_PER_STEP * latents

        def work() -> None:
            scaled = self._latents[:, :latents] * self._std + self._mean
            self._network.step(scaled, first, self._frames[:made])

        return work


class FrameStream:
    """Decodes a stream's latents in order; any chunking gives the same frames.

    Attributes:
        kept: its history while another stream decodes; None: it is in the decoder's buffers, or there is none yet.
    """

    def __init__(self, decoder: BlockDecoder) -> None:
        self._decoder = decoder
        self.started = self.closed = False
        self.kept: list[Tensor] | None = None

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of the next latents.

        Args:
            latents: [latent_channels, count, height / 8, width / 8], normalised.

        Returns:
            uint8 [frames, height, width, 3] on the decoder's device: four frames a latent, but one for the first.
        """
        with self._decoder.turn(self) as recorder:
            frames = [part.clone() for part in self._decoder.run(self, latents)]
            return recorder.hand_out(frames[0] if len(frames) == 1 else torch.cat(frames))

    def skip(self, latents: Tensor) -> None:
        """Decode latents for the sake of those that follow."""
        with self._decoder.turn(self):
            for _ in self._decoder.run(self, latents):
                pass

    def check(self) -> None:
        """Check that what has been decoded so far is finite; waits for the device.

        Raises:
            ModelError: it is not.
        """
        with self._decoder.turn(self):
            if not all(part.isfinite().all() for part in self._decoder.history):
                dtype = str(self._decoder.dtype).removeprefix("torch.")
                raise ModelError(
                    f"decoder: values beyond {dtype}, or NaN in a weight; a wider vae_precision (bf16, fp32) may help"
                )

    def start(self, latents: Tensor, timer: StageTimer) -> Pending:
        """As `decode`, with the frames on their way; what is enqueued later does not wait for them."""
        with self._decoder.turn(self, callers_wait=False) as recorder, timer.stage("decode"):
            parts = [self._decoder.delivery.take(part) for part in self._decoder.run(self, recorder.take_in(latents))]
            return parts[0] if len(parts) == 1 else Parts(parts)

    def close(self) -> None:
        """Let go of its history."""
        self.closed, self.kept = True, None


class _Network:
    """The decoder's layers over their buffers."""

    def __init__(self, vae: Vae, level: Level) -> None:
        decoder = vae.decoder
        self.device = vae.conv2.weight.device
        self._scale = FusedConvolution(vae.conv2, level)
        self._head = FusedConvolution(decoder.conv1, level)
        self._middle: list[FusedResidualBlock | FusedFrameAttention] = [
            FusedFrameAttention(layer) if isinstance(layer, FrameAttention) else FusedResidualBlock(layer, level)
            for layer in decoder.middle
            if isinstance(layer, FrameAttention | ResidualBlock)
        ]
        self._levels: list[tuple[list[FusedResidualBlock], FusedUpsample | None]] = []
        blocks: list[FusedResidualBlock] = []
        for layer in decoder.upsamples:
            if isinstance(layer, ResidualBlock):
                blocks.append(FusedResidualBlock(layer, level))
            else:
                assert isinstance(layer, Upsample)
                self._levels.append((blocks, FusedUpsample(layer, level)))
                level, blocks = level.doubled(layer.time_conv is not None), []
        self._levels.append((blocks, None))
        self._output = FusedOutput(decoder.head, level)
        inside = [part for blocks, last in self._levels for part in (*blocks, last) if part is not None]
        every = (self._scale, self._head, *self._middle, *inside, self._output)
        self._convolutions = [each for part in every for each in part.convolutions]
        self.inputs: list[CausalInput] = [each.input for each in self._convolutions if each.input is not None]

    @property
    def bytes(self) -> int:
        """Of input buffers and weights."""
        return sum(each.weight.nbytes for each in self._convolutions) + sum(each.bytes for each in self.inputs)

    def step(self, latents: Tensor, first: bool, out: Tensor) -> None:
        """Latents [channels, count, rows, columns] to frames in `out`."""
        count = latents.shape[1]
        pictures = latents.permute(1, 2, 3, 0).to(self._scale.weight.dtype).contiguous()
        causal_conv3d(pictures, self._scale.weight, bias=self._scale.bias, out=self._head.body(count))
        stream = Sum(self._head.over(count), self._head.bias)
        for layer in self._middle:
            stream = layer.step(stream)
        for blocks, upsample in self._levels:
            whole = blocks if upsample is None else blocks[:-1]
            for block in whole:
                stream = block.step(stream)
            if upsample is not None:
                stream = upsample.step(blocks[-1], stream, first)
        self._output.step(stream, out)
