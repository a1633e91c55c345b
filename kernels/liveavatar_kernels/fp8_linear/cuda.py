"""The CUTLASS GEMM of `liveavatar_kernels._C`: csrc/fp8_linear."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from .tiling import is_long_sum, suits_wide_tiles


def fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    row_max: bool,
) -> tuple[Tensor, Tensor]:
    """As the custom op, in bf16 and without row maxima."""
    module = extension.load()
    m, k = x.shape
    n = weight.shape[0]
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    if is_long_sum(k):
        tile = module.PRECISE_128X128
    else:
        tile = module.FAST_128X256 if suits_wide_tiles(m, n, processors) else module.FAST_128X128
    wide_bias = None if bias is None else bias.float()
    out = x.new_empty((m, n), dtype=dtype)
    workspace = x.new_empty(module.fp8_linear_workspace(m, n, k, tile), dtype=torch.uint8)
    module.fp8_linear(
        x.data_ptr(),
        weight.data_ptr(),
        x_scale.data_ptr(),
        weight_scale.data_ptr(),
        0 if wide_bias is None else wide_bias.data_ptr(),
        out.data_ptr(),
        m,
        n,
        k,
        gelu,
        tile,
        workspace.data_ptr(),
        workspace.numel(),
        torch.cuda.current_stream().cuda_stream,
    )
    return out, x.new_empty((m, 0), dtype=torch.float32)


def absent(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "built for sm_90a alone"
    return extension.absent()


def refuses(x: Tensor, weight: Tensor, dtype: torch.dtype, tma: bool) -> str | None:
    """Why the kernel cannot take a layer on a device where it runs; `tma` as `Tiling.of`."""
    if dtype != torch.bfloat16:
        return f"writes bfloat16, not {dtype}"
    if x.shape[0] == 0:
        return "needs a token"
    if not (tma and x.is_contiguous() and weight.is_contiguous()) or weight.shape[0] % 16:
        return "needs features in multiples of 16, and operands that are dense and aligned to 16 bytes"
    return None
