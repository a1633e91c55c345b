"""What surrounds the VAE's convolutions, in one pass over memory, channels last: bias, residual, norm and SiLU.

total = x + bias + residual; values = SiLU(total / ||total|| * sqrt(channels) * gamma), with SiLU(z) = z * sigmoid(z)
and ||total|| over the channels of a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..buffers import check_buffer, overlap, same
from ..dispatch import ANYWHERE, Implementation, Op, never_absent, on_device, triton_absent
from . import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Normed(NamedTuple):
    """What the op returns, both of x's shape and dtype.

    Attributes:
        total: the sum; x itself where nothing is added and nothing was given to write it to.
        values: normalised and activated.
    """

    total: Tensor
    values: Tensor


def _triton(*arguments: Any) -> None:
    from . import kernel

    kernel.channel_norm(*arguments)


OP = Op(
    "channel_norm",
    (
        Implementation("triton", _triton, triton_absent, automatic=("cuda",)),
        Implementation("reference", reference.channel_norm, never_absent, automatic=ANYWHERE),
    ),
)


def channel_norm(
    x: Tensor,
    gamma: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
    implementation: str | None = None,
) -> Normed:
    """Add, normalise over the last axis, activate; arithmetic in float32, or float64 for float64 x.

    The norm reads the sum as it is returned, rounded to x's dtype.

    Args:
        x: [..., channels], contiguous, such as a convolution's [frames, height, width, channels] without its bias.
        gamma: [channels]. A norm below 1e-12 counts as 1e-12, so that zeros stay zeros.
        bias: [channels], added to every position.
        residual: added; of x's shape and dtype, contiguous.
        silu: whether SiLU follows the norm.
        out, sum_out: written in place of new tensors; of x's shape and dtype, contiguous, such as the tail of the next
            convolution's input. Either may be x or residual itself, but share no other memory with them or each other.
        implementation: "reference" or "triton"; None picks.

    Raises:
        ValueError: shapes, strides, dtypes, devices or memory do not fit.
        KernelUnavailableError: `implementation` cannot run here.
    """
    adds = bias is not None or residual is not None
    if sum_out is None and adds:
        sum_out = x.new_empty(x.shape)
    values = _run(x, gamma, bias, residual, silu, out, sum_out, implementation)
    return Normed(x if sum_out is None else sum_out, values)


def channel_norm_values(
    x: Tensor,
    gamma: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
    out: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`channel_norm` where nobody needs the sum, which is not written: the same values, bit for bit."""
    return _run(x, gamma, bias, residual, silu, out, None, implementation)


def _run(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    out: Tensor | None,
    sum_out: Tensor | None,
    implementation: str | None,
) -> Tensor:
    if not x.ndim or x.dtype not in _DTYPES:
        raise ValueError(f"x: expected floating-point [..., channels], not {x.dtype} {list(x.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"x: expected to be contiguous with channels last, {list(x.shape)} has strides {x.stride()}")
    for name, vector in (("gamma", gamma), ("bias", bias)):
        if vector is not None and (vector.shape != x.shape[-1:] or not vector.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous [{x.shape[-1]}], not {list(vector.shape)}")
    for name, tensor in (("residual", residual), ("out", out), ("sum_out", sum_out)):
        if tensor is not None:
            check_buffer(name, tensor, x.shape, x.dtype, x.device)

    def refuses(name: str) -> str | None:
        return "no float64" if name == "triton" and x.dtype == torch.float64 else None

    chosen = OP.choose(x.device, implementation, refuses=refuses)
    values = x.new_empty(x.shape) if out is None else out
    _custom_op(x, gamma, bias, residual, silu, sum_out, values, chosen)
    return values


@torch.library.custom_op("liveavatar_kernels::channel_norm", mutates_args=("total", "values"))
def _custom_op(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    total: Tensor | None,
    values: Tensor,
    implementation: str,
) -> None:
    _check_memory(values, total, [tensor for tensor in (x, residual) if tensor is not None])
    with on_device(x.device):
        OP[implementation].run(x, gamma, bias, residual, silu, total, values)


@_custom_op.register_fake
def _fake(*_: Any) -> None:
    return None


def _check_memory(values: Tensor, total: Tensor | None, read: Sequence[Tensor]) -> None:
    for name, written in (("out", values), ("sum_out", total)):
        if written is not None and any(overlap(written, tensor) and not same(written, tensor) for tensor in read):
            raise ValueError(f"{name}: shares a part of its memory with x or residual; it must share all or none")
    if total is not None and overlap(values, total):
        raise ValueError("out: shares memory with sum_out")
