"""A TAEHV decoder's layers on fused ops: channels last, a memory block's past frame at the head of its input.

Source: github.com/madebyollin/taehv, taehv.py. There, pictures are enlarged first and a 1x1 convolution makes two
frames of one after that; here it goes first, on a quarter of the pixels, which is the same.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from liveavatar_kernels.causal_conv3d import causal_conv3d, causal_conv3d_pixels
from torch import Tensor

from .fused import CausalInput, Level
from .light import LightDecoder, LightLevel

_BOUND = 3
"""Latents are squeezed between -3 and 3."""


class MemoryBlock:
    """Three convolutions around a shortcut, a ReLU behind each; the first sees the frame before, too."""

    def __init__(self, decoder: LightDecoder, name: str, level: Level) -> None:
        layers = [f"{name}.conv.{number}" for number in (0, 2, 4)]
        self._weights, self._biases = [decoder.weight(n) for n in layers], [decoder.bias(n) for n in layers]
        self.input = CausalInput(1, level, self._weights[0].shape[-1], self._weights[0])

    def step(self, frames: int, out: Tensor | None) -> Tensor:
        """[frames, rows, columns, channels] that lie in its input -> the same shape, written to `out` if given."""
        x = causal_conv3d(self.input.window(frames), self._weights[0], bias=self._biases[0]).relu_()
        x = causal_conv3d(x, self._weights[1], bias=self._biases[1]).relu_()
        shortcut = self.input.body(frames)
        y = causal_conv3d(x, self._weights[2], bias=self._biases[2], residual=shortcut, out=out).relu_()
        self.input.move_on(frames)
        return y


class LightStage:
    """Memory blocks at one picture size, and what doubles height and width behind them, and the frame rate."""

    def __init__(self, decoder: LightDecoder, layers: LightLevel, level: Level) -> None:
        self._blocks = [MemoryBlock(decoder, name, level) for name in layers.blocks]
        self._grow, self._up = decoder.weight(layers.grow), decoder.weight(layers.up)
        self._in_time = layers.in_time

    @property
    def inputs(self) -> list[CausalInput]:
        return [block.input for block in self._blocks]

    def step(self, frames: int, out: CausalInput | None) -> Tensor:
        """[frames, rows, columns, channels] that lie in its input -> [frames or 2 frames, 2 rows, ...], in `out`'s."""
        for block, following in pairwise(self._blocks):
            block.step(frames, following.input.body(frames))
        grown = causal_conv3d(self._blocks[-1].step(frames, None), self._grow)
        target = None if out is None else out.body(frames * (1 + self._in_time))
        return causal_conv3d(grown, self._up, upsample=True, interleaved=self._in_time, out=target)


class LightNetwork:
    """A TAEHV decoder over its buffers; `inputs` hold what it remembers."""

    def __init__(self, decoder: LightDecoder, level: Level) -> None:
        self._decoder = decoder
        self._stages: list[LightStage] = []
        for layers in decoder.shape.levels:
            self._stages.append(LightStage(decoder, layers, level))
            level = level.doubled(layers.in_time)
        self.inputs: list[CausalInput] = [each for stage in self._stages for each in stage.inputs]

    @property
    def device(self) -> torch.device:
        return self._decoder.device

    @property
    def bytes(self) -> int:
        """Memory of the buffers and of the decoder's weights."""
        return self._decoder.bytes + sum(each.bytes for each in self.inputs)

    def step(self, latents: Tensor, first: bool, out: Tensor) -> None:
        """Latents to frames in `out`.

        A video's first latent becomes as many frames as others do, of which the last one is shown.

        Args:
            latents: float32 [channels, count, rows, columns], as the weights take them (`LightDecoder.statistics`).
            first: whether it is a video's first one.
            out: [1 or 4 * count, 8 * rows, 8 * columns, 3], uint8 for frames as they are shown, or in the decoder's
                dtype, for values in [-1, 1].
        """
        decoder, frames = self._decoder, latents.shape[1]
        pictures = (torch.tanh(latents / _BOUND) * _BOUND).permute(1, 2, 3, 0).to(decoder.dtype).contiguous()
        head, last = decoder.shape.head, decoder.shape.last
        causal_conv3d(pictures, decoder.weight(head), bias=decoder.bias(head), out=self.inputs[0].body(frames)).relu_()
        for stage, following in pairwise(self._stages):
            frames = len(stage.step(frames, following.inputs[0]))
        y = self._stages[-1].step(frames, None).relu_()
        y = y[-1:] if first else y
        if out.dtype == torch.uint8:
            causal_conv3d_pixels(y, decoder.weight(last), decoder.bias(last), out=out)
        else:
            causal_conv3d(y, decoder.weight(last), bias=decoder.bias(last), out=out)
