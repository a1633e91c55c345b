"""Modulated norm: residual, LayerNorm, modulation and e4m3, by every implementation."""

from typing import Any

import pytest
import torch
from liveavatar_kernels import KernelUnavailableError
from liveavatar_kernels.e4m3 import E4M3, quantize_rows
from liveavatar_kernels.model_sizes import WAN_14B
from liveavatar_kernels.modulated_norm import Normed, kernel, modulated_norm
from liveavatar_kernels.modulated_norm.cases import CASES, EPS, Case, in_torch, model_cases
from liveavatar_kernels.tolerances import FLIPPED_SHARE, LEAST_SQNR, TIMES_WORSE
from support import relative_error, sqnr

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DENSE = [case for case in CASES if not case.quantized]
QUANTIZED = [case for case in CASES if case.quantized]
BY_NAME = {case.form: case for case in CASES}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_implementation = pytest.mark.parametrize("implementation", ["reference", "triton"])


def by_case(cases: list[Case]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def _exact(case: Case, arguments: dict[str, Any], residual: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Residual and values in float64; values of `residual` where it is given."""
    rows = {name: x.double() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    group = case.group_of_token()

    def row(name: str, default: float) -> torch.Tensor:
        found = torch.atleast_2d(rows.get(name, torch.tensor(default, dtype=torch.float64)))
        return found[group] if len(found) > 1 else found

    exact = rows["x"] + (row("gate", 1.0) * rows["branch"] if case.branch else 0.0)
    x = exact if residual is None else residual.double()
    centred = x - x.mean(-1, keepdim=True)
    values = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    values = values * row("weight", 1.0) + row("bias", 0.0)
    return exact, values * (1 + row("scale", 0.0)) + row("shift", 0.0)


@by_implementation
@by_dtype
@by_case(DENSE)
def test_as_exact_as_torch_at_that_precision(case: Case, dtype: torch.dtype, implementation: str) -> None:
    arguments = case.arguments(dtype)
    normed = modulated_norm(**arguments, implementation=implementation)
    dtypes = case.dtypes(dtype)
    assert normed.residual.dtype == dtypes.get("residual", dtypes["x"])
    assert normed.values.dtype == dtype
    assert normed.scale is None
    for ours, exact, plain in zip(normed, _exact(case, arguments), in_torch(case, arguments), strict=False):
        assert relative_error(ours, exact) <= TIMES_WORSE * relative_error(plain, exact)


@by_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@by_case([case for case in DENSE if case.branch])
def test_norm_reads_the_residual_as_it_is_returned(case: Case, dtype: torch.dtype, implementation: str) -> None:
    arguments = {**case.arguments(dtype), "dtype": torch.float32}
    normed = modulated_norm(**arguments, implementation=implementation)
    assert relative_error(normed.values, _exact(case, arguments, normed.residual)[1]) <= 1e-6


@by_implementation
@by_dtype
@by_case(QUANTIZED)
def test_e4m3_holds_the_quantised_values(case: Case, dtype: torch.dtype, implementation: str) -> None:
    arguments = case.arguments(dtype)
    normed = modulated_norm(**arguments, implementation=implementation)
    assert normed.values.dtype == E4M3
    values, scales = quantize_rows(_exact(case, arguments, normed.residual)[1].float())
    assert relative_error(normed.scale, scales) <= 1e-6
    differing = normed.values.float() != values.float()
    assert differing.float().mean() <= FLIPPED_SHARE, "beyond values that lie on the edge between two e4m3 numbers"
    assert relative_error(normed.values, values) <= 1e-3


@by_dtype
@by_case(QUANTIZED)
def test_e4m3_signal_to_noise_of_every_token(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    normed = modulated_norm(**arguments, implementation="triton")
    exact = modulated_norm(**{**arguments, "dtype": torch.float32}, implementation="reference").values
    stored = normed.values.float() * normed.scale[:, None]
    assert min(sqnr(*rows) for rows in zip(stored, exact, strict=True)) >= LEAST_SQNR


@by_dtype
@pytest.mark.parametrize("rows", [1, 8])
@by_case([BY_NAME["everything by segment"], BY_NAME["e4m3, affine, outliers"]])
def test_tokens_of_a_program_change_nothing(case: Case, rows: int, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    order = ("x", "branch", "gate", "shift", "scale", "weight", "bias", "ends")
    groups = max(case.groups, case.gate_groups, 1)
    tail = (groups, EPS, arguments["dtype"], arguments["residual_dtype"] or dtype)
    made = kernel.modulated_norm(*(arguments[name] for name in order), *tail, rows=rows)
    for ours, usual in zip(made, modulated_norm(**arguments, implementation="triton"), strict=True):
        assert (ours is None) == (usual is None)
        assert ours is None or ours.float().equal(usual.float())


def test_a_program_takes_one_row_at_the_models_sizes() -> None:
    specs = kernel.aot_specs(WAN_14B, 90)
    assert {spec.constexprs["ROWS"] for spec in specs} == {1}


@by_implementation
def test_without_a_branch_the_residual_is_x(implementation: str) -> None:
    arguments = BY_NAME["modulated"].arguments(torch.float32)
    assert modulated_norm(**arguments, implementation=implementation).residual is arguments["x"]


@by_implementation
def test_rows_may_be_apart(implementation: str) -> None:
    arguments = BY_NAME["residual only"].arguments(torch.float32)
    apart = {}
    for name in ("x", "branch"):
        wide = torch.full((5, 70), float("nan"))
        wide[:, 2:35] = arguments[name]
        apart[name] = wide[:, 2:35]
    together = modulated_norm(**arguments, implementation=implementation)
    sliced = modulated_norm(**{**arguments, **apart}, implementation=implementation)
    assert sliced.values.equal(together.values)
    assert sliced.residual.equal(together.residual)
    assert sliced.residual.is_contiguous()


@by_implementation
def test_tokens_behind_the_last_end_belong_to_the_last_group(implementation: str) -> None:
    arguments = BY_NAME["an empty segment"].arguments(torch.float32)
    cut = {**arguments, "ends": arguments["ends"].clamp(max=4)}
    values = [modulated_norm(**each, implementation=implementation).values for each in (arguments, cut)]
    assert values[0].equal(values[1])


def test_float64_stays() -> None:
    case = BY_NAME["everything by segment"]
    arguments = case.arguments(torch.float64)
    normed = modulated_norm(**{**arguments, "dtype": torch.float64})
    for ours, exact in zip(normed[:2], _exact(case, arguments), strict=True):
        assert ours.dtype == torch.float64
        assert relative_error(ours, exact) <= 1e-14
    with pytest.raises(KernelUnavailableError, match="no float64"):
        modulated_norm(**arguments, implementation="triton")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(20)}, r"x: expected floating-point \[tokens, dim\]"),
        ({"x": torch.zeros(20, 96, dtype=torch.int32)}, "x: expected floating-point"),
        ({"x": torch.zeros(96, 20).T}, "x: the values of a row must lie together"),
        ({"dtype": torch.int8}, "dtype: expected"),
        ({"branch": torch.zeros(19, 96)}, r"branch: expected \[20, 96\] like x"),
        ({"branch": None}, "without a branch"),
        ({"branch": None, "gate": None, "residual_dtype": torch.float16}, "without a branch"),
        ({"residual_dtype": E4M3}, "residual_dtype: expected"),
        ({"gate": torch.zeros(2, 96)}, r"gate: expected \[1 or 3, 96\]"),
        ({"shift": torch.zeros(96)}, r"shift: expected \[1 or 3, 96\]"),
        ({"scale": torch.zeros(96, 3).T}, "scale: the values of a row must lie together"),
        ({"weight": torch.ones(5)}, r"weight: expected \[96\]"),
        ({"bias": torch.ones(1, 96)}, r"bias: expected \[96\]"),
        ({"ends": torch.tensor([9, 11, 20])}, "ends: expected int32"),
        ({"ends": None}, "20 tokens are not 3 groups of equal length"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        modulated_norm(**{**BY_NAME["everything by segment"].arguments(torch.float32), **change})


@pytest.mark.parametrize(
    "case", [BY_NAME["everything by segment"], BY_NAME["e4m3"], BY_NAME["e4m3, affine, outliers"]], ids=lambda c: c.form
)
def test_traces_without_running(case: Case) -> None:
    arguments = case.arguments(torch.float32)
    given = [arguments[name] for name in ("x", "branch", "gate", "shift", "scale", "weight", "bias", "ends")]
    residual_dtype = arguments["residual_dtype"] or torch.float32
    torch.library.opcheck(
        torch.ops.liveavatar_kernels.modulated_norm.default,
        (*given, max(case.groups, 1), EPS, arguments["dtype"], residual_dtype, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_into_a_graph_as_one_node() -> None:
    arguments = BY_NAME["gated by segment"].arguments(torch.float32)

    def normed(x: torch.Tensor) -> Normed:
        return modulated_norm(**{**arguments, "x": x, "implementation": "reference"})

    compiled = torch.compile(normed, backend="eager", fullgraph=True)
    for ours, plain in zip(compiled(arguments["x"])[:2], normed(arguments["x"])[:2], strict=True):
        assert ours.equal(plain)


def test_every_form_is_compiled_ahead_of_time_where_it_can_run() -> None:
    forms = {case.form for case in model_cases(WAN_14B)}
    assert {spec.name for spec in kernel.aot_specs(WAN_14B, 90)} == {f"modulated_norm {form}" for form in forms}
    assert all("*fp8e4nv" not in spec.signature.values() for spec in kernel.aot_specs(WAN_14B, 80))
    assert len(kernel.aot_specs(WAN_14B, 80)) == len(forms) // 2


def test_bytes_count_what_must_move() -> None:
    case = Case("", 10, 64, branch=True, gate_groups=1, groups=2, wide=True, quantized=True)
    assert case.bytes == 10 * 64 * (4 + 2 + 2 + 1) + 10 * 4 + 64 * 4 * (1 + 2 + 2)
