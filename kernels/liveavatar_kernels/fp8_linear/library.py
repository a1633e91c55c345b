"""Library GEMMs behind the op: torch's rowwise-scaled product.

torchao and Transformer Engine are no implementations of their own. torchao hands rowwise-scaled float8 operands to
torch._scaled_mm, "cublaslt" here, and has a CUTLASS kernel only for sparse weights (torchao 2026-08). Transformer
Engine scales by tensor or by block, never by row and column (NVIDIA/TransformerEngine#358, 2026-06).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .tiling import is_long_sum

_FEW_TOKENS = 256
_SHORT_SUM = 3072


def scaled_mm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    row_max: bool,
) -> tuple[Tensor, Tensor]:
    """As the custom op, without row maxima: cuBLASLt on sm_90, torch's CUTLASS kernels elsewhere.

    The bias is rounded to `dtype`, as the library wants it; in float32 it is added afterwards, and so is GELU.
    """
    fused = bias is not None and dtype != torch.float32
    y = torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale[:, None],
        scale_b=weight_scale[None],
        bias=bias.to(dtype) if bias is not None and fused else None,
        out_dtype=dtype,
        use_fast_accum=not is_long_sum(x.shape[1]),
    )
    if bias is not None and not fused:
        y += bias
    return F.gelu(y, approximate="tanh") if gelu else y, y.new_empty((y.shape[0], 0), dtype=torch.float32)


def scaled_mm_absent(device: torch.device) -> str | None:
    """Why torch's rowwise-scaled product cannot run on a device."""
    if device.type != "cuda":
        return "needs a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return "needs sm_89 or newer"
    if capability == (8, 9) and _torch_version() < (2, 12):
        return "torch before 2.12 ignores the current stream on sm_89 (pytorch/pytorch#177651)"
    if capability[0] == 12:
        return "torch has no rowwise scales on sm_120 (pytorch/pytorch#192707)"
    return None


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def scaled_mm_refuses(tokens: int, in_features: int, out_features: int, tma: bool) -> str | None:
    """Why torch's rowwise-scaled product cannot take a layer on a device where it runs; `tma` as `Tiling.of`."""
    if in_features % 16 or out_features % 16 or not tma:
        return "needs features in multiples of 16, and operands that are aligned to 16 bytes"
    if tokens <= _FEW_TOKENS and in_features > _SHORT_SUM:
        return f"cuBLASLt fails for up to {_FEW_TOKENS} tokens and long sums (pytorch/ao#4582)"
    return None
