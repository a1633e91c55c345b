"""The residual stream with a branch that waits for the next norm, which adds it in the same pass over memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from liveavatar_kernels.e4m3 import Quantized
from liveavatar_kernels.modulated_norm import modulated_norm
from torch import Tensor

from .linear import Activation


@dataclass(frozen=True)
class Residual:
    """x + gate * branch, added in float32.

    Attributes:
        x: [tokens, dim].
        branch: [tokens, dim], or None.
        gate: [groups, dim] float32, for equal runs of tokens, or None for 1.
    """

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def plus(self, branch: Tensor, gate: Tensor | None = None) -> Residual:
        """The stream with another branch; the last one must have been added by `normed`."""
        assert self.branch is None
        return Residual(self.x, branch, gate)

    def normed(
        self,
        eps: float,
        dtype: torch.dtype,
        residual_dtype: torch.dtype,
        *,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Residual, Activation]:
        """Add the branch, rounding to `residual_dtype`, and normalise; arguments as for the op `modulated_norm`.

        Returns:
            The stream without a branch, and LayerNorm(x) * weight + bias, then * (1 + scale) + shift, in `dtype`.
        """
        made = modulated_norm(
            self.x,
            eps=eps,
            dtype=dtype,
            branch=self.branch,
            gate=_as_fine(self.gate, shift),
            shift=shift,
            scale=scale,
            weight=weight,
            bias=bias,
            residual_dtype=None if self.branch is None else residual_dtype,
        )
        return Residual(made.residual), made.values if made.scale is None else Quantized(made.values, made.scale)


def _as_fine(gate: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """The gate for as many groups as the shift has: a gate may belong to blocks, where a shift belongs to frames."""
    if gate is None or shift is None or len(gate) == 1 or len(gate) == len(shift) or len(shift) == 1:
        return gate
    return gate.repeat_interleave(len(shift) // len(gate), dim=0, output_size=len(shift))
