"""cuDNN behind the op, called so that it writes where the result belongs and never rounds to TF32.

What it cannot fold into a convolution costs a pass over memory here: upsampling, interleaved frames, bias, residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import expanded, spatial_padding, to_bytes, to_torch

_CHANNELS_AT_ONCE = 8
"""Output channels come in multiples of this many, 16 bytes in bf16, for the tensor cores; others are filled up."""


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
    interleaved: bool,
    out: Tensor | None,
) -> Tensor:
    """As the op; a new tensor unless `out` is given. The sum is rounded to x's dtype before anything is added."""
    x = expanded(x, upsample, interleaved)
    frames, height, width, _ = x.shape
    if out is None:
        out = x.new_empty(frames - weight.shape[1] + 1, height, width, weight.shape[0])
    y = out if residual is None else torch.empty_like(out)  # the residual may lie where the result goes
    _convolve(x, weight, y)
    if bias is not None:
        y += bias.to(y.dtype)
    return y if residual is None else torch.add(y, residual, out=out)


def causal_conv3d_pixels(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """As the op; the convolution's sum is rounded to x's dtype."""
    channels = weight.shape[0]
    filled = -channels % _CHANNELS_AT_ONCE
    weight = torch.cat((weight, weight.new_zeros(filled, *weight.shape[1:])))
    y = x.new_empty(*out.shape[:-1], channels + filled)
    _convolve(x, weight, y)
    out.copy_(to_bytes(y[..., :channels].float() + bias.float()))


def _convolve(x: Tensor, weight: Tensor, out: Tensor) -> None:
    taps, rows, columns = weight.shape[1:4]
    if taps > 1 and rows == columns == 1:  # over time alone: two dimensions, frames and pixels, are enough
        theirs, kernel = x.flatten(1, 2)[None].permute(0, 3, 1, 2), weight[:, :, 0].permute(0, 3, 1, 2)
        padding: tuple[int, ...] = (0, 0)
        out = out.flatten(1, 2)[None]
    else:
        theirs, kernel = to_torch(x, weight)
        padding = spatial_padding(kernel)
        out = out if taps == 1 else out[None]
    ones = [1] * len(padding)
    torch.ops.aten.cudnn_convolution.out(
        theirs,
        kernel,
        padding,
        ones,
        ones,
        1,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        False,
        out=out.movedim(-1, 1),
    )


def absent(device: torch.device) -> str | None:
    """Why cuDNN cannot run on a device."""
    if device.type != "cuda":
        return "needs a CUDA device"
    return None if torch.backends.cudnn.is_available() else "torch was built without cuDNN"
