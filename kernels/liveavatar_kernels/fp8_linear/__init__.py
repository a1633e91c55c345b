"""A linear layer on e4m3 operands.

y = act(x_scale[m] * weight_scale[n] * sum_k x[m, k] weight[n, k] + bias[n]), act being GELU(tanh) or nothing. It can be
quantised for the next layer at once; kernels that find the largest magnitudes on the way hand them over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import ANYWHERE, Implementation, Op, never_absent, on_device, triton_e4m3_absent
from ..e4m3 import E4M3, Quantized
from ..fp8_quantize import fp8_quantize
from . import choices, cuda, library, reference
from .tiling import ROW_MAX_COLUMNS, suits_tma


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from . import kernel

    return kernel.fp8_linear(*arguments)


OP = Op(
    "fp8_linear",
    (
        Implementation("triton", _triton, triton_e4m3_absent, automatic=("cuda",)),
        Implementation("reference", reference.fp8_linear, never_absent, automatic=ANYWHERE),
        Implementation("cublaslt", library.scaled_mm, library.scaled_mm_absent),
        Implementation("cuda", cuda.fp8_linear, cuda.absent),
    ),
)
_FINDS_ROW_MAX = ("triton", "reference")


def fp8_linear(
    x: Quantized,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    implementation: str | None = None,
) -> Tensor:
    """Apply a linear layer to e4m3 rows.

    Args:
        x: values [tokens, in], features next to each other, and scale [tokens].
        weight: e4m3 [out, in], features next to each other.
        weight_scale: float32 [out].
        bias: [out] in float32, float16 or bfloat16, or None.
        gelu: whether GELU in its tanh form follows.
        dtype: of the result, bfloat16, float16 or float32.
        implementation: "triton", "reference" (float32), "cublaslt" (torch._scaled_mm, whose bias is rounded to
            `dtype`) or "cuda" (CUTLASS, bfloat16 only); None takes what choices.json found fastest for the layer on
            this device, else Triton where it runs.

    Returns:
        [tokens, out] in `dtype`. The same bits for the same arguments.

    Raises:
        ValueError: shapes, strides or dtypes do not fit.
        KernelUnavailableError: `implementation` cannot run here, or cannot take these arguments.
    """
    chosen = _choose(x, weight, weight_scale, bias, gelu, dtype, False, implementation)
    return _custom_op(*x, weight, weight_scale, bias, gelu, dtype, False, chosen)[0]


def fp8_linear_quantized(
    x: Quantized,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    implementation: str | None = None,
) -> Quantized:
    """Apply a linear layer to e4m3 rows and quantise what comes out, rounded to bfloat16 in between.

    "triton" and "reference" hand the largest magnitudes over to the quantiser, which finds them itself after others.

    Args:
        x, weight, weight_scale, bias, gelu, implementation: as of `fp8_linear`.

    Returns:
        values [tokens, out] and scale [tokens].

    Raises:
        ValueError: shapes, strides or dtypes do not fit.
        KernelUnavailableError: `implementation` cannot run here, or cannot take these arguments.
    """
    dtype = torch.bfloat16
    chosen = _choose(x, weight, weight_scale, bias, gelu, dtype, True, implementation)
    known = chosen in _FINDS_ROW_MAX
    y, row_max = _custom_op(*x, weight, weight_scale, bias, gelu, dtype, known, chosen)
    return fp8_quantize(y, row_max=row_max if known else None, implementation=chosen if known else None)


def _choose(
    x: Quantized,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    quantized: bool,
    requested: str | None,
) -> str:
    _check(x, weight, weight_scale, bias, dtype)
    device = x.values.device
    (tokens, in_features), out_features = x.values.shape, weight.shape[0]
    tma = suits_tma(x.values, weight, dtype)

    def refuses(name: str) -> str | None:
        if name == "cublaslt":
            return library.scaled_mm_refuses(tokens, in_features, out_features, tma)
        return cuda.refuses(x.values, weight, dtype, tma) if name == "cuda" else None

    names = tuple(implementation.name for implementation in OP.implementations)
    prefer = choices.preferred(device, names, in_features, out_features, gelu, quantized)
    return OP.choose(device, requested, prefer, refuses)


def _check(x: Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    for name, tensor in (("x.values", x.values), ("weight", weight)):
        if tensor.dtype != E4M3 or tensor.ndim != 2:
            raise ValueError(f"{name}: expected a matrix in {E4M3}, not {tensor.dtype} {list(tensor.shape)}")
        if tensor.stride(1) != 1:
            raise ValueError(f"{name}: the features of a row must lie together, strides are {tensor.stride()}")
    tokens, features = x.values.shape
    if features == 0 or weight.shape[1] != features:
        raise ValueError(f"weight: expected [out, {features}] for x of {features} features, not {list(weight.shape)}")
    floats = (torch.float32, torch.float16, torch.bfloat16)
    _check_vector("x.scale", x.scale, tokens, floats[:1])
    _check_vector("weight_scale", weight_scale, weight.shape[0], floats[:1])
    if bias is not None:
        _check_vector("bias", bias, weight.shape[0], floats)
    if dtype not in floats:
        raise ValueError(f"dtype: expected {_either(floats)}, not {dtype}")


def _check_vector(name: str, tensor: Tensor, length: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != (length,) or tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected {_either(dtypes)} [{length}], not {tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: its numbers must lie together, the stride is {tensor.stride()}")


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)


@torch.library.custom_op("liveavatar_kernels::fp8_linear", mutates_args=())
def _custom_op(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    row_max: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """The result, and with `row_max` the largest magnitude of every ROW_MAX_COLUMNS of its rows, else [tokens, 0]."""
    with on_device(x.device):
        return OP[implementation].run(x, x_scale, weight, weight_scale, bias, gelu, dtype, row_max)


@_custom_op.register_fake
def _fake(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    row_max: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    tiles = -(-weight.shape[0] // ROW_MAX_COLUMNS) if row_max else 0
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
    return y, x.new_empty((x.shape[0], tiles), dtype=torch.float32)
