"""The decoder's layers on fused ops: channels last, each convolution's history at the head of its own input buffer.

They compute what `layers` does, with the same parameters. A layer writes where the next one reads, so nothing is
concatenated, padded or cloned, and what surrounds a convolution is one pass over memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from liveavatar_kernels.causal_conv3d import causal_conv3d, causal_conv3d_pixels
from liveavatar_kernels.channel_norm import channel_norm, channel_norm_values
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import CausalConv3d, ChannelNorm, FrameAttention, OutputConvolution, ResidualBlock, Upsample


@dataclass(frozen=True)
class Level:
    """How large a layer's pictures are: most frames in a call, rows and columns."""

    frames: int
    rows: int
    columns: int

    def doubled(self, in_time: bool) -> Level:
        """Behind an upsampling layer."""
        return Level(self.frames * (1 + in_time), 2 * self.rows, 2 * self.columns)


@dataclass(frozen=True)
class Sum:
    """x + bias + residual, to be added by who reads it. Pictures are [frames, rows, columns, channels]."""

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None


class CausalInput:
    """A convolution's input: frames behind those of the last call, which it looks back to."""

    def __init__(self, past: int, level: Level, channels: int, like: Tensor) -> None:
        self._past = past
        self._frames = like.new_zeros(past + level.frames, level.rows, level.columns, channels)

    @property
    def history(self) -> Tensor:
        """What the next call looks back to: [past, rows, columns, channels]."""
        return self._frames[: self._past]

    @property
    def bytes(self) -> int:
        return self._frames.nbytes

    def body(self, frames: int) -> Tensor:
        """Where the next frames are to be written."""
        return self._frames[self._past : self._past + frames]

    def window(self, frames: int) -> Tensor:
        """History and the next frames."""
        return self._frames[: self._past + frames]

    def move_on(self, frames: int) -> None:
        """Keep the last frames as history."""
        last = self._frames[frames : frames + self._past]
        self.history.copy_(last if frames >= self._past else last.clone())


class FusedConvolution:
    """A convolution's weight, [out, kt, kh, kw, in], and bias, and its input if it looks back."""

    def __init__(self, convolution: nn.Conv3d | nn.Conv2d, level: Level) -> None:
        weight = convolution.weight
        weight = weight[:, :, None] if weight.ndim == 4 else weight
        assert convolution.bias is not None
        self.weight, self.bias = weight.permute(0, 2, 3, 4, 1).contiguous(), convolution.bias
        past = weight.shape[2] - 1
        self.input = CausalInput(past, level, weight.shape[1], weight) if past else None

    @property
    def convolutions(self) -> list[FusedConvolution]:
        return [self]

    def body(self, frames: int) -> Tensor:
        """Where its next input frames are to be written."""
        assert self.input is not None
        return self.input.body(frames)

    def over(
        self, frames: int, bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The convolution of the frames that have been written, which then become history."""
        assert self.input is not None
        y = causal_conv3d(self.input.window(frames), self.weight, bias=bias, residual=residual, out=out)
        self.input.move_on(frames)
        return y


class FusedResidualBlock:
    """Norm, SiLU, convolution, twice, around a shortcut."""

    def __init__(self, block: ResidualBlock, level: Level) -> None:
        self._gammas = [_gamma(block.residual[name]) for name in ("0", "3")]
        self._first, self._second = (FusedConvolution(_conv(block.residual[name]), level) for name in ("2", "6"))
        self._shortcut = None if block.shortcut is None else FusedConvolution(block.shortcut, level)

    @property
    def convolutions(self) -> list[FusedConvolution]:
        return [each for each in (self._first, self._second, self._shortcut) if each is not None]

    def step(self, x: Sum) -> Sum:
        """[frames, rows, columns, channels_in] -> [frames, rows, columns, channels_out]."""
        total, y = self._convolved(x)
        return Sum(self._second.over(len(y)), self._second.bias, self._around(total))

    def added(self, x: Sum, out: Tensor | None) -> Tensor:
        """As `step`, for a reader that cannot add; written to `out` if given."""
        total, y = self._convolved(x)
        return self._second.over(len(y), self._second.bias, self._around(total), out)

    def _convolved(self, x: Sum) -> tuple[Tensor, Tensor]:
        """The input, added up, and what the first convolution makes of it."""
        frames = len(x.x)
        total, _ = channel_norm(x.x, self._gammas[0], bias=x.bias, residual=x.residual, out=self._first.body(frames))
        y = self._first.over(frames)
        channel_norm_values(y, self._gammas[1], bias=self._first.bias, out=self._second.body(frames))
        return total, y

    def _around(self, total: Tensor) -> Tensor:
        if self._shortcut is None:
            return total
        return causal_conv3d(total, self._shortcut.weight, bias=self._shortcut.bias)


class FusedFrameAttention:
    """Single-head attention among the pixels of each frame."""

    def __init__(self, attention: FrameAttention) -> None:
        self._gamma = _gamma(attention.norm)
        self._qkv, self._proj = attention.to_qkv, attention.proj

    @property
    def convolutions(self) -> list[FusedConvolution]:
        return []

    def step(self, x: Sum) -> Sum:
        """[frames, rows, columns, channels] -> the same shape."""
        total, normed = channel_norm(x.x, self._gamma, bias=x.bias, residual=x.residual, silu=False)
        q, k, v = F.linear(normed.flatten(1, 2), self._qkv.weight.flatten(1), self._qkv.bias).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return Sum(F.linear(attended, self._proj.weight.flatten(1)).view_as(total), self._proj.bias, total)


class FusedUpsample:
    """Doubles height and width, and the frame rate where there is a convolution over time.

    That one makes two frames in the channels of one; the next convolution reads them where they lie, enlarged.
    """

    def __init__(self, upsample: Upsample, level: Level) -> None:
        self._time = None if upsample.time_conv is None else FusedConvolution(upsample.time_conv, level)
        self._space = FusedConvolution(_conv(upsample.resample["1"]), level)

    @property
    def convolutions(self) -> list[FusedConvolution]:
        return [each for each in (self._time, self._space) if each is not None]

    def step(self, block: FusedResidualBlock, x: Sum, first: bool) -> Sum:
        """`block`, and then the upsampling: [frames, rows, columns, channels] -> [frames or 2 frames, 2 rows, ...].

        A video's first latent is not doubled in time, and leaves nothing behind.
        """
        frames, time = len(x.x), None if first else self._time
        total = block.added(x, None if time is None else time.body(frames))
        if time is not None:
            total = time.over(frames, time.bias)
        y = causal_conv3d(total, self._space.weight, upsample=True, interleaved=time is not None)
        return Sum(y, self._space.bias)


class FusedOutput:
    """Norm, SiLU and the convolution to pixels."""

    def __init__(self, head: OutputConvolution, level: Level) -> None:
        self._gamma, self._convolution = _gamma(head["0"]), FusedConvolution(_conv(head["2"]), level)

    @property
    def convolutions(self) -> list[FusedConvolution]:
        return [self._convolution]

    def step(self, x: Sum, out: Tensor) -> None:
        """[frames, rows, columns, channels] -> `out`, uint8 for frames as they are shown, or in x's dtype."""
        frames, convolution = len(x.x), self._convolution
        assert convolution.input is not None
        channel_norm_values(x.x, self._gamma, bias=x.bias, residual=x.residual, out=convolution.body(frames))
        window = convolution.input.window(frames)
        if out.dtype == torch.uint8:
            causal_conv3d_pixels(window, convolution.weight, convolution.bias, out=out)
        else:
            causal_conv3d(window, convolution.weight, bias=convolution.bias, out=out)
        convolution.input.move_on(frames)


def _gamma(norm: nn.Module) -> Tensor:
    assert isinstance(norm, ChannelNorm)
    return norm.gamma.flatten()


def _conv(module: nn.Module) -> CausalConv3d | nn.Conv2d:
    assert isinstance(module, CausalConv3d | nn.Conv2d)
    return module
