"""Quantisation of rows to e4m3, by every implementation."""

from typing import Any

import pytest
import torch
from liveavatar_kernels.e4m3 import E4M3, quantize_rows
from liveavatar_kernels.fp8_quantize import fp8_quantize, kernel
from liveavatar_kernels.fp8_quantize.cases import CASES, Case, in_torch
from liveavatar_kernels.model_sizes import WAN_14B
from liveavatar_kernels.tolerances import LEAST_SQNR
from support import bits, sqnr

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BY_FORM = {case.form: case for case in CASES}
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_implementation = pytest.mark.parametrize("implementation", ["reference", "triton"])


@by_implementation
@by_dtype
@by_case
def test_equals_quantisation_in_float32(case: Case, dtype: torch.dtype, implementation: str) -> None:
    arguments = case.arguments(dtype)
    quantized = fp8_quantize(**arguments, implementation=implementation)
    values, scale = quantize_rows(arguments["x"].float())
    assert quantized.values.dtype == E4M3
    assert quantized.values.is_contiguous()
    assert not quantized.values.float().isnan().any()
    assert quantized.scale.equal(scale)
    assert bits(quantized.values).equal(bits(values))


@by_dtype
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    "case", [BY_FORM[form] for form in ("a slice", "outliers, maxima known")], ids=lambda c: c.name
)
def test_any_rows_of_a_program(case: Case, rows: int, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    expected, expected_scale = quantize_rows(arguments["x"].float())
    values, scale = kernel.fp8_quantize(**arguments, rows=rows)
    assert scale.equal(expected_scale)
    assert bits(values).equal(bits(expected))


def test_a_program_takes_one_row_at_the_models_sizes() -> None:
    assert {spec.constexprs["ROWS"] for spec in kernel.aot_specs(WAN_14B, 90)} == {1}


@by_implementation
@pytest.mark.parametrize("case", [case for case in CASES if case.outliers], ids=lambda case: case.name)
def test_signal_to_noise_of_every_token(case: Case, implementation: str) -> None:
    arguments = case.arguments(torch.bfloat16)
    exact = arguments["x"].float()
    quantized = fp8_quantize(**arguments, implementation=implementation)
    stored = quantized.values.float() * quantized.scale[:, None]
    assert min(sqnr(*rows) for rows in zip(stored, exact, strict=True)) >= LEAST_SQNR
    with_one_scale = in_torch(arguments)
    assert min(sqnr(*rows) for rows in zip(with_one_scale, exact, strict=True)) < 20


@by_implementation
def test_zeros_stay_zeros_and_too_small_a_maximum_saturates(implementation: str) -> None:
    quantized = fp8_quantize(torch.zeros(2, 40), implementation=implementation)
    assert not quantized.values.float().any()
    assert (quantized.scale > 0).all()
    x = torch.tensor([[1.0, -8.0, 0.5]])
    quantized = fp8_quantize(x, row_max=torch.tensor([[1.0]]), implementation=implementation)
    assert quantized.values.float().tolist() == [[448.0, -448.0, 224.0]]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(63)}, r"x: expected float32, bf16 or fp16 \[tokens, dim\]"),
        ({"x": torch.zeros(63, 40, dtype=torch.float64)}, "x: expected float32, bf16 or fp16"),
        ({"x": torch.zeros(40, 63).T}, "x: the values of a row must lie together"),
        ({"row_max": torch.ones(63)}, r"row_max: expected float32 \[63, parts\]"),
        ({"row_max": torch.ones(62, 1)}, r"row_max: expected float32 \[63, parts\]"),
        ({"row_max": torch.ones(63, 0)}, r"row_max: expected float32 \[63, parts\]"),
        ({"row_max": torch.ones(63, 1).bfloat16()}, "row_max: expected float32"),
        ({"row_max": torch.ones(2, 63).T}, "row_max: expected to be contiguous"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        fp8_quantize(**{"x": torch.ones(63, 40), **change})


@by_case
def test_traces_without_running(case: Case) -> None:
    arguments = case.arguments(torch.float32)
    torch.library.opcheck(
        torch.ops.liveavatar_kernels.fp8_quantize.default,
        (arguments["x"], arguments["row_max"], "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_bytes_count_what_must_move() -> None:
    assert Case("", 10, 64).bytes == 10 * 64 * 3 + 10 * 4
    assert Case("", 10, 64, parts=2).bytes == 10 * 64 * 3 + 10 * 3 * 4
