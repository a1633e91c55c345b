"""Add a gated branch to the residual stream, normalise the result and modulate it, in one pass over memory.

residual = x + gate * branch; values = (LayerNorm(residual) * weight + bias) * (1 + scale) + shift.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import ANYWHERE, Implementation, Op, never_absent, on_device, refuses_e4m3, triton_absent
from ..e4m3 import E4M3
from . import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Normed(NamedTuple):
    """What the op returns.

    Attributes:
        residual: [tokens, dim], the stream with the branch added; x itself where there is none.
        values: [tokens, dim], normalised and modulated; e4m3 values are to be multiplied by their token's scale.
        scale: float32 [tokens] for e4m3, else None.
    """

    residual: Tensor
    values: Tensor
    scale: Tensor | None


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    from . import kernel

    return kernel.modulated_norm(*arguments)


OP = Op(
    "modulated_norm",
    (
        Implementation("triton", _triton, triton_absent, automatic=("cuda",)),
        Implementation("reference", reference.modulated_norm, never_absent, automatic=ANYWHERE),
    ),
)


def modulated_norm(
    x: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    ends: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> Normed:
    """Residual, LayerNorm and modulation of tokens; arithmetic in float32, or float64 for float64 x.

    The norm reads the residual as it is returned, rounded to `residual_dtype`.

    Args:
        x: [tokens, dim], the residual stream; rows may be apart in memory.
        eps: added to the variance.
        dtype: of the values; torch.float8_e4m3fn: with a scale per token, from the unrounded values.
        branch: [tokens, dim], added to x; rows may be apart.
        gate: [groups, dim], multiplies the branch; None: 1.
        shift, scale: [groups, dim], of the modulation; None: 0.
        weight, bias: [dim], of an affine LayerNorm; None: 1 and 0.
        ends: int32 [groups] on x's device, ascending: a token belongs to the first group that ends behind it, or to
            the last one. None: groups of equal length. Gate, shift and scale have `groups` rows or one for all tokens.
        residual_dtype: of the new residual; None: x's.
        implementation: "reference" or "triton"; None picks.

    Raises:
        ValueError: shapes, strides or dtypes do not fit.
        KernelUnavailableError: `implementation` cannot run here.
    """
    if x.ndim != 2 or x.dtype not in _DTYPES:
        raise ValueError(f"x: expected floating-point [tokens, dim], not {x.dtype} {list(x.shape)}")
    tokens, dim = x.shape
    if dtype not in (*_DTYPES, E4M3):
        raise ValueError(f"dtype: expected a floating-point dtype or {E4M3}, not {dtype}")
    if branch is None and (gate is not None or residual_dtype not in (None, x.dtype)):
        raise ValueError("gate and residual_dtype: of no use without a branch")
    if residual_dtype not in (None, *_DTYPES):
        raise ValueError(f"residual_dtype: expected a floating-point dtype, not {residual_dtype}")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch: expected {list(x.shape)} like x, not {list(branch.shape)}")
    if ends is not None and (ends.dtype != torch.int32 or ends.ndim != 1 or not len(ends)):
        raise ValueError(f"ends: expected int32 [groups], not {ends.dtype} {list(ends.shape)}")
    modulation = {"gate": gate, "shift": shift, "scale": scale}
    groups = len(ends) if ends is not None else _groups(modulation)
    for name, tensor in modulation.items():
        if tensor is not None and tuple(tensor.shape) not in ((1, dim), (groups, dim)):
            raise ValueError(f"{name}: expected [1 or {groups}, {dim}], not {list(tensor.shape)}")
    if ends is None and tokens % groups:
        raise ValueError(f"ends: needed, since {tokens} tokens are not {groups} groups of equal length")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != (dim,):
            raise ValueError(f"{name}: expected [{dim}], not {list(tensor.shape)}")
    for name, tensor in {"x": x, "branch": branch, **modulation, "weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the values of a row must lie together, strides are {tensor.stride()}")
    e4m3 = refuses_e4m3(x.device, dtype == E4M3)

    def refuses(name: str) -> str | None:
        if name == "triton" and torch.float64 in (x.dtype, dtype, residual_dtype):
            return "no float64"
        return e4m3(name)

    chosen = OP.choose(x.device, implementation, refuses=refuses)
    made = _custom_op(
        x, branch, gate, shift, scale, weight, bias, ends, groups, eps, dtype, residual_dtype or x.dtype, chosen
    )
    return Normed(x if branch is None else made[-1], made[0], made[1] if dtype == E4M3 else None)


def _groups(modulation: dict[str, Tensor | None]) -> int:
    return max((len(tensor) for tensor in modulation.values() if tensor is not None and tensor.ndim), default=0) or 1


@torch.library.custom_op("liveavatar_kernels::modulated_norm", mutates_args=())
def _custom_op(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    ends: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    implementation: str,
) -> list[Tensor]:
    """Values, their scales for e4m3, the new residual if there is a branch."""
    with on_device(x.device):
        residual, values, scales = OP[implementation].run(
            x, branch, gate, shift, scale, weight, bias, ends, groups, eps, dtype, residual_dtype
        )
    made = (values, scales, None if branch is None else residual)
    return [tensor for tensor in made if tensor is not None]


@_custom_op.register_fake
def _fake(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    ends: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    implementation: str,
) -> list[Tensor]:
    made = [x.new_empty(x.shape, dtype=dtype)]
    if dtype == E4M3:
        made.append(x.new_empty(x.shape[:1], dtype=torch.float32))
    if branch is not None:
        made.append(x.new_empty(x.shape, dtype=residual_dtype))
    return made
