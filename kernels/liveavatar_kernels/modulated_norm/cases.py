"""Shapes of modulated_norm, declared once for tests, benchmarks and warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..e4m3 import E4M3
from ..model_sizes import ModelSizes

EPS = 1e-6
_OUTLIER = 100.0


@dataclass(frozen=True)
class Case:
    """A residual stream of `tokens`, and what is done to it.

    Attributes:
        form: what is done.
        branch: whether a branch is added.
        gate_groups: rows of its gate; 0: none.
        groups: rows of shift and scale; 0: none.
        ends: of the groups, where they are not equally long.
        affine: whether LayerNorm has weight and bias.
        wide, wide_residual: whether the stream read, and the one returned, are float32 whatever the model's dtype.
        narrow_modulation: whether gate, shift and scale are in the model's dtype instead of float32.
        quantized: whether values are e4m3.
        outliers: make some values of the stream 100 times larger, whole tokens and whole channels.
    """

    form: str
    tokens: int
    dim: int
    branch: bool = False
    gate_groups: int = 0
    groups: int = 0
    ends: tuple[int, ...] = ()
    affine: bool = False
    wide: bool = False
    wide_residual: bool = False
    narrow_modulation: bool = False
    quantized: bool = False
    outliers: bool = False

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens of {self.dim}, {self.form}"

    @property
    def bytes(self) -> int:
        """Least traffic with a model in bf16; what all tokens share is read once."""
        sizes = {name: dtype.itemsize for name, dtype in self.dtypes(torch.bfloat16).items()}
        total = self.tokens * sizes.get("values_scale", 0)
        total += self.tokens * self.dim * sum(sizes.get(name, 0) for name in ("x", "branch", "residual", "values"))
        total += self.dim * self.groups * sum(sizes.get(name, 0) for name in ("shift", "scale"))
        total += self.dim * self.gate_groups * sizes.get("gate", 0)
        return total + self.dim * sum(sizes.get(name, 0) for name in ("weight", "bias"))

    def dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Dtypes of the arguments and results that this case has, by name, for a model in `dtype`."""
        return dict(self._dtypes(dtype))

    def _dtypes(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.dtype]]:
        yield "x", torch.float32 if self.wide else dtype
        if self.branch:
            yield "branch", dtype
            yield "residual", torch.float32 if self.wide_residual else dtype
        modulation = dtype if self.narrow_modulation else torch.float32
        if self.gate_groups:
            yield "gate", modulation
        if self.groups:
            yield "shift", modulation
            yield "scale", modulation
        if self.affine:
            yield "weight", dtype
            yield "bias", dtype
        if self.ends:
            yield "ends", torch.int32
        yield "values", E4M3 if self.quantized else dtype
        if self.quantized:
            yield "values_scale", torch.float32

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of the op, random; float64 makes all of them float64."""
        generator = torch.Generator().manual_seed(seed)
        dtypes = self.dtypes(dtype)

        def random(name: str, rows: int, centre: float, spread: float) -> Tensor | None:
            values = centre + spread * torch.randn(rows, self.dim, generator=generator)
            if name == "x" and self.outliers:
                values[::17] *= _OUTLIER
                values[:, ::13] *= _OUTLIER
            wanted = torch.float64 if dtype == torch.float64 else dtypes.get(name)
            return values.to(device, wanted) if name in dtypes else None

        weight, bias = random("weight", 1, 1.0, 0.1), random("bias", 1, 0.0, 0.1)
        return {
            "x": random("x", self.tokens, 0.3, 2.0),
            "eps": EPS,
            "dtype": dtypes["values"],
            "branch": random("branch", self.tokens, 0.0, 1.0),
            "gate": random("gate", self.gate_groups, 0.0, 0.5),
            "shift": random("shift", self.groups, 0.0, 0.5),
            "scale": random("scale", self.groups, 0.0, 0.3),
            "weight": weight if weight is None else weight[0],
            "bias": bias if bias is None else bias[0],
            "ends": torch.tensor(self.ends, dtype=torch.int32, device=device) if self.ends else None,
            "residual_dtype": torch.float64 if dtype == torch.float64 and self.branch else dtypes.get("residual"),
        }

    def group_of_token(self) -> Tensor:
        """int64 [tokens]."""
        lengths = torch.tensor(self.ends).diff(prepend=torch.zeros(1, dtype=torch.int64)) if self.ends else None
        groups = torch.arange(len(self.ends) or max(self.groups, self.gate_groups, 1))
        return groups.repeat_interleave(self.tokens // len(groups) if lengths is None else lengths)[: self.tokens]


def in_torch(case: Case, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Residual and values by the same maths in torch at the stream's precision: the yardstick for a kernel's error."""
    x, branch = arguments["x"], arguments["branch"]
    group = case.group_of_token().to(x.device)

    def row(name: str, dtype: torch.dtype) -> Tensor:
        rows = arguments[name].to(dtype)
        return rows[group] if len(rows) > 1 else rows

    residual = x
    if branch is not None:
        added = branch.to(x.dtype)
        added = added if arguments["gate"] is None else row("gate", x.dtype) * added
        residual = (x + added).to(arguments["residual_dtype"])
    dtype = residual.dtype
    weight, bias = (arguments[name].to(dtype) if case.affine else None for name in ("weight", "bias"))
    values = F.layer_norm(residual, residual.shape[-1:], weight, bias, EPS)
    if case.groups:
        values = values * (1 + row("scale", dtype)) + row("shift", dtype)
    return residual, values if case.quantized else values.to(arguments["dtype"])


def model_cases(sizes: ModelSizes) -> tuple[Case, ...]:
    """The norms of a layer at every picture size: before self-attention, text and audio attention, FFN, next layer."""
    cases = []
    for tokens in sizes.block_tokens:
        plain = Case("", tokens, sizes.dim)
        forms = (
            replace(plain, form="modulated", groups=1),
            replace(plain, form="gated residual, affine", branch=True, gate_groups=1, affine=True, wide_residual=True),
            replace(plain, form="residual, modulated", branch=True, groups=1, wide=True, wide_residual=True),
            replace(plain, form="gated residual, modulated", branch=True, gate_groups=1, groups=1, wide=True),
            replace(
                plain,
                form="gated residual, modulated by frame",
                branch=True,
                gate_groups=1,
                groups=sizes.block_frames,
                wide=True,
                narrow_modulation=True,
            ),
        )
        for form in forms:
            cases += [form, replace(form, form=f"{form.form}, e4m3", quantized=True)]
    return tuple(cases)


CASES = (
    Case("modulated", 63, 96, groups=3),
    Case("affine", 1, 1000, affine=True),
    Case("gated residual, affine", 7, 1000, branch=True, gate_groups=1, affine=True, wide_residual=True),
    Case("residual only", 5, 33, branch=True, wide=True, wide_residual=True),
    Case("everything by segment", 20, 96, True, 1, 3, (9, 11, 20), affine=True, wide=True, narrow_modulation=True),
    Case("gated by segment", 11, 64, branch=True, gate_groups=2, groups=1, ends=(4, 11)),
    Case("an empty segment", 6, 40, groups=3, ends=(2, 2, 6)),
    Case("model's dim", 3, 5120, branch=True, gate_groups=3, groups=3, wide_residual=True),
    Case("e4m3", 63, 96, groups=3, quantized=True),
    Case("e4m3, gated residual", 3, 5120, branch=True, gate_groups=1, groups=1, wide=True, quantized=True),
    Case("e4m3, affine, outliers", 37, 200, branch=True, affine=True, quantized=True, outliers=True),
)
