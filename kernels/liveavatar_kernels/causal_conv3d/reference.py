"""The convolution in plain PyTorch: the float32 truth that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
    interleaved: bool,
    out: Tensor | None,
) -> Tensor:
    """As the op; a new tensor unless `out` is given."""
    y = convolve_wide(x, weight, bias, upsample, interleaved)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(x.dtype).contiguous() if out is None else out.copy_(y)


def causal_conv3d_pixels(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """As the op."""
    out.copy_(to_bytes(convolve_wide(x, weight, bias)))


def to_bytes(y: Tensor) -> Tensor:
    """Pixels in [-1, 1], clamped, to [0, 255], rounded to nearest."""
    return y.clamp(-1, 1).add_(1).mul_(127.5).round_()


def convolve_wide(
    x: Tensor, weight: Tensor, bias: Tensor | None, upsample: bool = False, interleaved: bool = False
) -> Tensor:
    """In float32, or float64 for float64 x."""
    x = x if x.dtype == torch.float64 else x.float()
    bias = None if bias is None else bias.to(x.dtype)
    return _from_torch(_convolve(*to_torch(expanded(x, upsample, interleaved), weight.to(x.dtype)), bias))


def expanded(x: Tensor, upsample: bool, interleaved: bool) -> Tensor:
    """What x stands for, with all its frames, rows and columns; by one copy, or none."""
    if not upsample and not interleaved:
        return x
    frames, height, width, channels = x.shape
    within, times = 1 + interleaved, 1 + upsample
    pieces = x.view(frames, height, 1, width, 1, within, channels // within).permute(0, 5, 1, 2, 3, 4, 6)
    whole = pieces.expand(-1, -1, -1, times, -1, times, -1)
    return whole.reshape(frames * within, height * times, width * times, channels // within)


def to_torch(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x and weight as torch's convolutions want them, without a copy: 2-D over frames where there is no past."""
    if weight.shape[1] == 1:
        return x.permute(0, 3, 1, 2), weight[:, 0].permute(0, 3, 1, 2)
    return x[None].permute(0, 4, 1, 2, 3), weight.permute(0, 4, 1, 2, 3)


def spatial_padding(weight: Tensor) -> tuple[int, ...]:
    """Zeros around x, for a weight as torch wants it: none before the first frame."""
    height, width = (size // 2 for size in weight.shape[-2:])
    return (height, width) if weight.ndim == 4 else (0, height, width)


def _from_torch(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1) if y.ndim == 4 else y.permute(0, 2, 3, 4, 1)[0]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = spatial_padding(weight)
    ones = (1,) * len(padding)
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # torch takes its slow path here: its rule for oneDNN overlooks an axis of 5-D inputs (docs/log.md)
        return torch.mkldnn_convolution(x, weight, bias, padding, ones, ones, 1)
    if (
        x.device.type == "cuda" and torch.backends.cudnn.is_available()
    ):  # elsewhere it rounds to TF32 unless told not to
        y = torch.cudnn_convolution(x, weight, padding, ones, ones, 1, False, True, False)
        return y if bias is None else y + bias.view(-1, *ones)
    return (F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, bias, padding=padding)
