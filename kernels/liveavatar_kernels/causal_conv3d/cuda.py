"""The CUTLASS convolution of `liveavatar_kernels._C`: csrc/causal_conv3d."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension

_CHANNELS_AT_ONCE = 8
"""Channels in the 16 bytes that TMA wants everything to be a multiple of."""
_WIDE = 192


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
    interleaved: bool,
    out: Tensor | None,
) -> Tensor:
    """As the op, in bf16, for what `refuses` lets pass; a new tensor unless `out` is given."""
    module = extension.load()
    channels_out, kt, kh, kw, channels_in = weight.shape
    frames, height, width, _ = x.shape
    frames -= kt - 1
    if out is None:
        out = x.new_empty(frames, height, width, channels_out)
    wide_bias = None if bias is None else bias.float()
    module.causal_conv3d(
        x.data_ptr(),
        weight.data_ptr(),
        0 if wide_bias is None else wide_bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        frames,
        height,
        width,
        channels_in,
        channels_out,
        kt,
        kh,
        kw,
        module.CONV_256X96 if channels_out % _WIDE else module.CONV_128X192,
        torch.cuda.current_stream().cuda_stream,
    )
    return out


def absent(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "built for sm_90a alone"
    return extension.absent()


def refuses(x: Tensor, weight: Tensor, plain: bool) -> str | None:
    """Why the kernel cannot take a convolution on a device where it runs.

    `plain`: nothing is folded into where x is read or how the result is written.
    """
    if not plain:
        return "folds nothing in: no upsampling, no interleaved frames, no bytes"
    if x.dtype != torch.bfloat16:
        return f"computes in bfloat16, not {x.dtype}"
    if weight.shape[0] % _CHANNELS_AT_ONCE or weight.shape[-1] % _CHANNELS_AT_ONCE:
        return f"needs channels in multiples of {_CHANNELS_AT_ONCE}"
    return None
