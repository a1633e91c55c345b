"""The VAE's convolutions: causal in time, zeros around the picture, channels last.

y[t, h, w, o] = bias[o] + residual[t, h, w, o]
    + sum over dt, dh, dw, c of weight[o, dt, dh, dw, c] * x[t + dt, h + dh - kh // 2, w + dw - kw // 2, c]

The frames that the first ones look back to lie at the head of x, in the same buffer: nothing is padded or copied. What
comes before a convolution in the decoder is folded into where it reads: nearest upsampling, and frames of which two
lie in the channels of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..buffers import check_buffer, overlap, same
from ..dispatch import ANYWHERE, Implementation, Op, never_absent, on_device, triton_absent
from . import cuda, library, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_RGB = 3
_MOST_ELEMENTS = 2**31
"""Triton addresses the elements of a frame with 32 bits."""


def _triton(*arguments: Any) -> Tensor:
    from . import kernel

    return kernel.causal_conv3d(*arguments)


def _triton_pixels(*arguments: Any) -> None:
    from . import kernel

    kernel.causal_conv3d_pixels(*arguments)


OP = Op(
    "causal_conv3d",
    (
        Implementation("cudnn", library.causal_conv3d, library.absent, automatic=("cuda",)),
        Implementation("reference", reference.causal_conv3d, never_absent, automatic=ANYWHERE),
        Implementation("triton", _triton, triton_absent),
        Implementation("cuda", cuda.causal_conv3d, cuda.absent),
    ),
)
_PIXELS = {
    "cudnn": library.causal_conv3d_pixels,
    "reference": reference.causal_conv3d_pixels,
    "triton": _triton_pixels,
}


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    upsample: bool = False,
    interleaved: bool = False,
    out: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Convolve frames; the sum in float32, or float64 for float64 x.

    Args:
        x: [past + frames, height, width, channels_in], contiguous, past = kt - 1. Interleaved: [frames / 2, height,
            width, 2 * channels_in], where frame 2t is the first half of the channels of x[t], frame 2t + 1 the second.
        weight: [channels_out, kt, kh, kw, channels_in], contiguous, in x's dtype; kh and kw are 1 or 3.
        bias: [channels_out].
        residual: added; of the result's shape and x's dtype, contiguous.
        upsample: whether height and width are doubled first, each pixel becoming four; kt must be 1.
        interleaved: whether x holds two frames in one; kt must be 1.
        out: written in place of a new tensor; of the result's shape and x's dtype, contiguous. It may be the residual
            itself, but shares no other memory with what is read.
        implementation: "cudnn" (which rounds the sum before anything is added to it), "triton", "cuda" (CUTLASS,
            bfloat16 only, no upsampling, no interleaved frames) or "reference"; None picks.

    Returns:
        [frames, height, width, channels_out] in x's dtype, with twice the height and width where upsampled.

    Raises:
        ValueError: shapes, strides, dtypes, devices or memory do not fit.
        KernelUnavailableError: `implementation` cannot run here.
    """
    shape = _check(x, weight, bias, upsample, interleaved)
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            check_buffer(name, tensor, shape, x.dtype, x.device)
    chosen = _choose(x, weight, shape, implementation, plain=not upsample and not interleaved)
    if out is None:
        return _custom_op(x, weight, bias, residual, upsample, interleaved, chosen)
    _custom_op_into(x, weight, bias, residual, upsample, interleaved, out, chosen)
    return out


def causal_conv3d_pixels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    out: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """The decoder's last convolution, as frames are shown: round((clamp(y, -1, 1) + 1) * 127.5).

    Args:
        x, implementation: as of `causal_conv3d`; "cuda" writes no bytes.
        weight, bias: as there, with three output channels.
        out: uint8 [frames, height, width, 3], contiguous, written in place of a new tensor.

    Returns:
        uint8 [frames, height, width, 3].

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit.
        KernelUnavailableError: `implementation` cannot run here.
    """
    shape = _check(x, weight, bias, False, False)
    if shape[-1] != _RGB:
        raise ValueError(f"weight: expected {_RGB} output channels for pixels, not {shape[-1]}")
    if out is None:
        out = x.new_empty(shape, dtype=torch.uint8)
    check_buffer("out", out, shape, torch.uint8, x.device)
    _custom_op_pixels(x, weight, bias, out, _choose(x, weight, shape, implementation, plain=False))
    return out


def _choose(x: Tensor, weight: Tensor, shape: tuple[int, ...], requested: str | None, plain: bool) -> str:
    """`plain`: nothing is folded into where x is read or how the result is written."""

    def refuses(name: str) -> str | None:
        if name == "cuda":
            return cuda.refuses(x, weight, plain)
        if name != "triton":
            return None
        if max(x.shape[1:].numel(), torch.Size(shape[1:]).numel()) >= _MOST_ELEMENTS:
            return f"frames of {_MOST_ELEMENTS} elements or more"
        return "no float64" if x.dtype == torch.float64 else None

    return OP.choose(x.device, requested, refuses=refuses)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, upsample: bool, interleaved: bool) -> tuple[int, ...]:
    """Shape of the result."""
    for name, tensor, axes in (("x", x, "frames, height, width, channels"), ("weight", weight, "out, kt, kh, kw, in")):
        if tensor.ndim != axes.count(",") + 1 or tensor.dtype not in _DTYPES:
            raise ValueError(f"{name}: expected floating-point [{axes}], not {tensor.dtype} {list(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected to be contiguous, {list(tensor.shape)} has strides {tensor.stride()}")
    channels_out, kt, kh, kw, channels_in = weight.shape
    frames, height, width, channels = x.shape
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: expected {x.dtype} like x, not {weight.dtype}")
    if kh not in (1, 3) or kw not in (1, 3):
        raise ValueError(f"weight: expected kernels of 1 or 3 rows and columns, not {kh}x{kw}")
    if kt != 1 and (upsample or interleaved):
        raise ValueError(f"weight: expected kt = 1 for a convolution that upsamples or is interleaved, not {kt}")
    if channels != channels_in * (1 + interleaved):
        raise ValueError(f"x: expected {channels_in * (1 + interleaved)} channels, as weight has them, not {channels}")
    if frames < kt or not height * width * channels * channels_out:
        raise ValueError(f"x: expected at least {kt} frames and no empty axis, not {list(x.shape)}")
    if bias is not None and (bias.shape != (channels_out,) or not bias.is_contiguous()):
        raise ValueError(f"bias: expected contiguous [{channels_out}], not {list(bias.shape)}")
    doubled = 1 + upsample
    return (frames - kt + 1) * (1 + interleaved), height * doubled, width * doubled, channels_out


@torch.library.custom_op("liveavatar_kernels::causal_conv3d", mutates_args=())
def _custom_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
    interleaved: bool,
    implementation: str,
) -> Tensor:
    with on_device(x.device):
        return OP[implementation].run(x, weight, bias, residual, upsample, interleaved, None)


@_custom_op.register_fake
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
    interleaved: bool,
    implementation: str,
) -> Tensor:
    return x.new_empty(_check(x, weight, bias, upsample, interleaved))


@torch.library.custom_op("liveavatar_kernels::causal_conv3d_into", mutates_args=("out",))
def _custom_op_into(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
    interleaved: bool,
    out: Tensor,
    implementation: str,
) -> None:
    if overlap(out, x) or (residual is not None and overlap(out, residual) and not same(out, residual)):
        raise ValueError("out: shares memory with x, or a part of it with residual")
    with on_device(x.device):
        OP[implementation].run(x, weight, bias, residual, upsample, interleaved, out)


@_custom_op_into.register_fake
def _fake_into(*_: Any) -> None:
    return None


@torch.library.custom_op("liveavatar_kernels::causal_conv3d_pixels", mutates_args=("out",))
def _custom_op_pixels(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, implementation: str) -> None:
    with on_device(x.device):
        _PIXELS[implementation](x, weight, bias, out)


@_custom_op_pixels.register_fake
def _fake_pixels(*_: Any) -> None:
    return None
