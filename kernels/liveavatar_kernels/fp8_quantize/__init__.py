"""Quantise rows to e4m3 with a scale each: scale = max |row| / 448, values = row / scale.

Where the op that made the rows hands their largest magnitudes over, rows are read once, by as many programs as help.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import ANYWHERE, Implementation, Op, never_absent, on_device, triton_e4m3_absent
from ..e4m3 import E4M3, Quantized
from . import reference


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from . import kernel

    return kernel.fp8_quantize(*arguments)


OP = Op(
    "fp8_quantize",
    (
        Implementation("triton", _triton, triton_e4m3_absent, automatic=("cuda",)),
        Implementation("reference", reference.fp8_quantize, never_absent, automatic=ANYWHERE),
    ),
)


def fp8_quantize(x: Tensor, *, row_max: Tensor | None = None, implementation: str | None = None) -> Quantized:
    """Quantise every row of x with a scale of its own.

    Args:
        x: [tokens, dim], float32, bf16 or fp16; rows may be apart in memory.
        row_max: float32 [tokens, parts], largest magnitudes of parts of a row; the largest of them is the row's. What
            exceeds it saturates. None: they are found first.
        implementation: "reference" or "triton"; None picks.

    Raises:
        ValueError: shapes, strides or dtypes do not fit.
        KernelUnavailableError: `implementation` cannot run here.
    """
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x: expected float32, bf16 or fp16 [tokens, dim], not {x.dtype} {list(x.shape)}")
    if x.stride(1) != 1:
        raise ValueError(f"x: the values of a row must lie together, strides are {x.stride()}")
    if row_max is not None:
        fits = row_max.ndim == 2 and row_max.shape[0] == x.shape[0] and row_max.shape[1] > 0
        if row_max.dtype != torch.float32 or not fits:
            raise ValueError(
                f"row_max: expected float32 [{x.shape[0]}, parts], not {row_max.dtype} {list(row_max.shape)}"
            )
        if not row_max.is_contiguous():
            raise ValueError(f"row_max: expected to be contiguous, strides are {row_max.stride()}")
    return Quantized(*_custom_op(x, row_max, OP.choose(x.device, implementation)))


@torch.library.custom_op("liveavatar_kernels::fp8_quantize", mutates_args=())
def _custom_op(x: Tensor, row_max: Tensor | None, implementation: str) -> tuple[Tensor, Tensor]:
    with on_device(x.device):
        return OP[implementation].run(x, row_max)


@_custom_op.register_fake
def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[:1], dtype=torch.float32)
