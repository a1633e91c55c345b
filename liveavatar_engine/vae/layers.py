"""Layers of the causal VAE. What a layer remembers of earlier frames lies in a `History`, not in the layer.

Parameter names follow the checkpoint, whose modules are numbered by their position in sequences with activations and
dropout in between.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_NORM_EPS = 1e-12


class History:
    """Frames that causal layers carry from one call to the next, by layer; empty at the start of a video."""

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor] = {}

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._frames

    def get(self, layer: nn.Module) -> Tensor:
        return self._frames[layer]

    def put(self, layer: nn.Module, frames: Tensor) -> None:
        """Remember `frames`, [1, channels, frames, height, width]."""
        self._frames[layer] = frames.clone()

    def equals(self, other: History) -> bool:
        """Whether both hold the same frames, bit for bit: then the same input gives the same output for ever."""
        return self._frames.keys() == other._frames.keys() and all(
            torch.equal(frames, other._frames[layer]) for layer, frames in self._frames.items()
        )

    def copy(self) -> History:
        """A history that goes its own way from here; frames themselves are never written in place."""
        twin = History()
        twin._frames = dict(self._frames)
        return twin


class CausalConv3d(nn.Conv3d):
    """Convolution whose first axis, time, sees past frames only; before the video's start there are zeros."""

    def __init__(self, channels_in: int, channels_out: int, kernel: tuple[int, int, int]) -> None:
        frames, rows, columns = kernel
        self.past, self.spatial_padding = frames - 1, (0, rows // 2, columns // 2)
        super().__init__(channels_in, channels_out, kernel, padding=self.spatial_padding)

    def step(self, x: Tensor, history: History) -> Tensor:
        """[1, channels_in, frames, height, width] -> [1, channels_out, frames, height, width]."""
        if not self.past:
            return self._convolve(x)
        past = history.get(self) if self in history else x.new_zeros(*x.shape[:2], self.past, *x.shape[3:])
        x = torch.cat((past, x), dim=2)
        history.put(self, x[:, :, -self.past :])
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            return self(x)
        # torch takes its slow path here: its rule for oneDNN overlooks an axis of 5-D inputs (docs/log.md)
        ones = (1, 1, 1)
        return torch.mkldnn_convolution(x, self.weight, self.bias, self.spatial_padding, ones, ones, 1)


class ChannelNorm(nn.Module):
    """x / ||x|| * sqrt(channels) * gamma over the channel axis."""

    def __init__(self, channels: int, spatial_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *([1] * spatial_axes)))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, ...] -> the same shape."""
        norm = x.square().sum(dim=1, keepdim=True).sqrt().clamp_min(_NORM_EPS)
        return x / norm * (x.shape[1] ** 0.5 * self.gamma)


class ResidualBlock(nn.Module):
    """Two causal convolutions behind norm and SiLU, around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(channels_in),
                "2": CausalConv3d(channels_in, channels_out, (3, 3, 3)),
                "3": ChannelNorm(channels_out),
                "6": CausalConv3d(channels_out, channels_out, (3, 3, 3)),
            }
        )
        self.shortcut = CausalConv3d(channels_in, channels_out, (1, 1, 1)) if channels_in != channels_out else None

    def step(self, x: Tensor, history: History) -> Tensor:
        """[1, channels_in, frames, height, width] -> [1, channels_out, frames, height, width]."""
        shortcut = x if self.shortcut is None else self.shortcut.step(x, history)
        for norm, convolution in (("0", "2"), ("3", "6")):
            causal = self.residual[convolution]
            assert isinstance(causal, CausalConv3d)
            x = causal.step(F.silu(self.residual[norm](x)), history)
        return x + shortcut


class FrameAttention(nn.Module):
    """Single-head attention among the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, spatial_axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def step(self, x: Tensor, history: History) -> Tensor:
        """[1, channels, frames, height, width] -> the same shape; keeps no history."""
        frames = _to_frames(x)
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + _from_frames(self.proj(attended.transpose(1, 2).view_as(frames)))


class Downsample(nn.Module):
    """Halves height and width, and the frame rate where `in_time`; a video's first frame stays alone in time."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def step(self, x: Tensor, history: History) -> Tensor:
        """[1, channels, frames, height, width] -> [1, channels, frames or frames / 2, height / 2, width / 2]."""
        x = _from_frames(self.resample["1"](F.pad(_to_frames(x), (0, 1, 0, 1))))
        if self.time_conv is None:
            return x
        first = self not in history
        window = x if first else torch.cat((history.get(self), x), dim=2)
        history.put(self, x[:, :, -1:])
        return x if first else self.time_conv(window)


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; doubles the frame rate where `in_time`.

    A video's first latent is not doubled in time, and leaves nothing behind for the second one's convolution, which
    starts from zeros.
    """

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if in_time else None

    def step(self, x: Tensor, history: History) -> Tensor:
        """[1, channels, frames, height, width] -> [1, channels / 2, frames or 2 frames, 2 height, 2 width]."""
        if self.time_conv is not None:
            if self in history:
                early, late = self.time_conv.step(x, history).chunk(2, dim=1)
                x = torch.stack((early, late), dim=3).flatten(2, 3)
            else:
                history.put(self, x[:, :, :0])
        doubled = F.interpolate(_to_frames(x), scale_factor=2.0, mode="nearest-exact")
        return _from_frames(self.resample["1"](doubled))


Layer = ResidualBlock | FrameAttention | Downsample | Upsample


class Stack(nn.ModuleList):
    """Layers one after the other, each with its share of the history."""

    def step(self, x: Tensor, history: History) -> Tensor:
        for layer in self:
            assert isinstance(layer, Layer)
            x = layer.step(x, history)
        return x


class OutputConvolution(nn.ModuleDict):
    """Norm, SiLU and a causal convolution at the end of a coder."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__({"0": ChannelNorm(channels_in), "2": CausalConv3d(channels_in, channels_out, (3, 3, 3))})

    def step(self, x: Tensor, history: History) -> Tensor:
        convolution = self["2"]
        assert isinstance(convolution, CausalConv3d)
        return convolution.step(F.silu(self["0"](x)), history)


def middle(channels: int) -> Stack:
    return Stack([ResidualBlock(channels, channels), FrameAttention(channels), ResidualBlock(channels, channels)])


def _to_frames(x: Tensor) -> Tensor:
    """[1, channels, frames, height, width] -> [frames, channels, height, width]."""
    return x[0].transpose(0, 1)


def _from_frames(x: Tensor) -> Tensor:
    """[frames, channels, height, width] -> [1, channels, frames, height, width]."""
    return x.transpose(0, 1)[None]
