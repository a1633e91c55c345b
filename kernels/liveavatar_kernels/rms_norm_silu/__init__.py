"""Norm over channels and SiLU of the VAE, in one pass over memory, channels last.

y = SiLU(x / ||x|| * sqrt(channels) * gamma), with SiLU(z) = z * sigmoid(z) and ||x|| over the channels of a position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import ANYWHERE, Implementation, Op, never_absent, on_device, triton_absent
from . import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _triton(*arguments: Any) -> Tensor:
    from . import kernel

    return kernel.rms_norm_silu(*arguments)


OP = Op(
    "rms_norm_silu",
    (
        Implementation("triton", _triton, triton_absent, automatic=("cuda",)),
        Implementation("reference", reference.rms_norm_silu, never_absent, automatic=ANYWHERE),
    ),
)


def rms_norm_silu(x: Tensor, gamma: Tensor, *, implementation: str | None = None) -> Tensor:
    """Norm over the last axis, then SiLU; arithmetic in float32, or float64 for float64 x.

    Args:
        x: [..., channels], contiguous, such as [batch, frames, height, width, channels]. A norm below 1e-12 counts as
            1e-12, so that zeros stay zeros.
        gamma: [channels], contiguous.
        implementation: "reference" or "triton"; None picks.

    Returns:
        x's shape and dtype.

    Raises:
        ValueError: shapes, strides or dtypes do not fit.
        KernelUnavailableError: `implementation` cannot run here.
    """
    if not x.ndim or x.dtype not in _DTYPES:
        raise ValueError(f"x: expected floating-point [..., channels], not {x.dtype} {list(x.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"x: expected to be contiguous with channels last, {list(x.shape)} has strides {x.stride()}")
    if gamma.shape != x.shape[-1:] or not gamma.is_contiguous():
        raise ValueError(f"gamma: expected contiguous [{x.shape[-1]}], not {list(gamma.shape)}")

    def refuses(name: str) -> str | None:
        return "no float64" if name == "triton" and x.dtype == torch.float64 else None

    return _custom_op(x, gamma, OP.choose(x.device, implementation, refuses=refuses))


@torch.library.custom_op("liveavatar_kernels::rms_norm_silu", mutates_args=())
def _custom_op(x: Tensor, gamma: Tensor, implementation: str) -> Tensor:
    with on_device(x.device):
        return OP[implementation].run(x, gamma)


@_custom_op.register_fake
def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)
