"""Encoder and decoder networks."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import CausalConv3d, Downsample, History, OutputConvolution, ResidualBlock, Stack, Upsample, middle
from .shape import VaeShape

_RGB = 3


class Encoder(nn.Module):
    """Pixels to mean and log-variance, before the last 1x1x1 convolution."""

    def __init__(self, shape: VaeShape) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(_RGB, shape.widths[0], (3, 3, 3))
        self.downsamples = Stack()
        channels = shape.widths[0]
        for level, width in enumerate(shape.widths):
            for _ in range(shape.blocks):
                self.downsamples.append(ResidualBlock(channels, width))
                channels = width
            if level < len(shape.in_time):
                self.downsamples.append(Downsample(channels, shape.in_time[level]))
        self.middle = middle(channels)
        self.head = OutputConvolution(channels, 2 * shape.latent_channels)

    def step(self, pixels: Tensor, history: History) -> Tensor:
        """One latent frame from the video's first frame, or from the next four.

        [1, 3, 1 or 4, height, width] -> [1, 2 * latent_channels, 1, height / 8, width / 8].
        """
        x = self.conv1.step(pixels, history)
        x = self.middle.step(self.downsamples.step(x, history), history)
        return self.head.step(x, history)


class Decoder(nn.Module):
    """Latents, behind the first 1x1x1 convolution, to pixels."""

    def __init__(self, shape: VaeShape) -> None:
        super().__init__()
        widths, in_time = shape.widths[::-1], shape.in_time[::-1]
        channels = widths[0]
        self.conv1 = CausalConv3d(shape.latent_channels, channels, (3, 3, 3))
        self.middle = middle(channels)
        self.upsamples = Stack()
        for level, width in enumerate(widths):
            for _ in range(shape.blocks + 1):
                self.upsamples.append(ResidualBlock(channels, width))
                channels = width
            if level < len(in_time):
                self.upsamples.append(Upsample(channels, in_time[level]))
                channels //= 2
        self.head = OutputConvolution(channels, _RGB)

    def step(self, latent: Tensor, history: History) -> Tensor:
        """One latent frame to the video's first frame, or to the next four.

        [1, latent_channels, 1, height / 8, width / 8] -> [1, 3, 1 or 4, height, width].
        """
        x = self.middle.step(self.conv1.step(latent, history), history)
        return self.head.step(self.upsamples.step(x, history), history)
