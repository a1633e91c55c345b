"""Sum, norm over channels and SiLU, by every implementation."""

from typing import Any

import pytest
import torch
from liveavatar_kernels import KernelUnavailableError
from liveavatar_kernels.channel_norm import channel_norm, channel_norm_values, kernel
from liveavatar_kernels.channel_norm.cases import CASES, Case, in_torch, model_cases
from liveavatar_kernels.model_sizes import WAN_14B
from liveavatar_kernels.tolerances import TIMES_WORSE
from support import bits, relative_error

from liveavatar_engine.vae.layers import ChannelNorm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_implementation = pytest.mark.parametrize("implementation", ["reference", "triton"])


def _sum(arguments: dict[str, Any]) -> torch.Tensor:
    """The sum as it is rounded, in float64."""
    x = arguments["x"]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(wide)
    for added in (arguments["bias"], arguments["residual"]):
        total = total if added is None else total + added.to(wide)
    return total.to(x.dtype).double()


def _exact(arguments: dict[str, Any]) -> torch.Tensor:
    """The values in float64."""
    total = _sum(arguments)
    normed = total / total.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30) * arguments["gamma"].double()
    return normed * normed.sigmoid() if arguments["silu"] else normed


@by_implementation
@by_dtype
@by_case
def test_as_exact_as_torch_at_that_precision(case: Case, dtype: torch.dtype, implementation: str) -> None:
    arguments = case.arguments(dtype)
    exact, expected_sum = _exact(arguments), _sum(arguments)
    yardstick = relative_error(in_torch(arguments)[1], exact)
    total, values = channel_norm(**arguments, implementation=implementation)
    assert values.dtype == total.dtype == dtype
    assert relative_error(values, exact) <= TIMES_WORSE * yardstick
    assert total.double().equal(expected_sum), "float32 sums, rounded once"


@by_implementation
@by_dtype
def test_values_do_not_depend_on_whether_the_sum_is_kept(dtype: torch.dtype, implementation: str) -> None:
    arguments = CASES[3].arguments(dtype)
    del arguments["sum_out"]
    before = {name: arguments[name].clone() for name in ("x", "residual")}
    values = channel_norm_values(**arguments, implementation=implementation)
    assert all(arguments[name].equal(copy) for name, copy in before.items()), "nothing else is written"
    assert bits(values).equal(bits(channel_norm(**arguments, implementation=implementation).values))


@by_implementation
def test_nothing_added_is_no_sum(implementation: str) -> None:
    x = torch.randn(5, 96)
    assert channel_norm(x, torch.ones(96), implementation=implementation).total is x
    copy = torch.empty_like(x)
    assert channel_norm(x, torch.ones(96), sum_out=copy, implementation=implementation).total is copy
    assert copy.equal(x)


@by_implementation
@by_dtype
@pytest.mark.parametrize(("out", "sum_out"), [("x", "residual"), ("residual", "x"), ("tail", "x"), ("tail", "tail")])
def test_results_lie_where_they_are_wanted(out: str, sum_out: str, dtype: torch.dtype, implementation: str) -> None:
    """In the tail of a buffer, whose head is left alone, or over x and residual."""
    arguments = CASES[3].arguments(dtype)
    del arguments["sum_out"]
    expected = channel_norm(**arguments, implementation=implementation)
    buffers = [torch.full((2 + len(arguments["x"]), *arguments["x"].shape[1:]), 7.0, dtype=dtype) for _ in range(2)]
    given = {**arguments, "x": arguments["x"].clone(), "residual": arguments["residual"].clone()}
    places = [
        buffer[2:] if name == "tail" else given[name] for name, buffer in zip((out, sum_out), buffers, strict=True)
    ]
    total, values = channel_norm(**given, out=places[0], sum_out=places[1], implementation=implementation)
    assert values is places[0]
    assert total is places[1]
    assert bits(values).equal(bits(expected.values))
    assert bits(total).equal(bits(expected.total))
    assert all((buffer[:2] == 7).all() for buffer in buffers)


@by_implementation
def test_memory_that_is_shared_in_part_is_refused(implementation: str) -> None:
    frames = torch.randn(5, 2, 96)
    x, later = frames[:4], frames[1:]
    gamma = torch.ones(96)
    for arguments, complaint in (
        ({"out": later}, "out: shares a part of its memory with x or residual"),
        ({"residual": torch.zeros_like(x), "sum_out": later}, "sum_out: shares a part of its memory"),
        ({"out": x, "sum_out": x}, "out: shares memory with sum_out"),
    ):
        before = frames.clone()
        with pytest.raises(ValueError, match=complaint):
            channel_norm(x, gamma, **arguments, implementation=implementation)
        assert frames.equal(before)


@by_implementation
def test_zeros_stay_zeros(implementation: str) -> None:
    case = next(case for case in CASES if case.zeros)
    values = channel_norm(**case.arguments(torch.float32), implementation=implementation).values
    assert not values[: case.zeros].any()
    assert values[case.zeros :].all()


@by_implementation
@pytest.mark.parametrize("size", [1e-15, 1e-13, 1e-8, 1e8])
def test_norms_are_bounded_below_as_in_the_layer(size: float, implementation: str) -> None:
    x = size * torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    gamma = torch.linspace(0.5, 1.5, 96)
    layer = ChannelNorm(96, spatial_axes=0).requires_grad_(False)
    layer.gamma.copy_(gamma)
    expected = torch.nn.functional.silu(layer(x.double()))
    assert relative_error(channel_norm(x, gamma, implementation=implementation).values, expected) <= 1e-6


@by_implementation
def test_nan_stays_where_it_is(implementation: str) -> None:
    x = torch.randn(40, 96)
    x[3, 5] = float("nan")
    total, values = channel_norm(x, torch.ones(96), bias=torch.ones(96), implementation=implementation)
    assert values[3].isnan().all()
    assert values.isnan().sum() == 96
    assert total.isnan().sum() == 1


def test_float64_stays() -> None:
    arguments = CASES[3].arguments(torch.float64)
    exact = _exact(arguments)
    assert relative_error(channel_norm(**arguments).values, exact) <= 1e-14
    with pytest.raises(KernelUnavailableError, match="no float64"):
        channel_norm(**arguments, implementation="triton")


X = torch.zeros(2, 3, 96)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": X.int()}, r"x: expected floating-point \[..., channels\]"),
        ({"x": torch.zeros(96, 3, 5).permute(1, 2, 0)}, "x: expected to be contiguous with channels last"),
        ({"gamma": torch.ones(95)}, r"gamma: expected contiguous \[96\]"),
        ({"gamma": torch.ones(96, 1, 1, 1)}, r"gamma: expected contiguous \[96\]"),
        ({"bias": torch.ones(192)[::2]}, r"bias: expected contiguous \[96\]"),
        ({"residual": X[:1]}, r"residual: expected torch.float32 \[2, 3, 96\] on cpu, not torch.float32 \[1, 3, 96\]"),
        ({"residual": X.half()}, r"residual: expected torch.float32 .*, not torch.float16"),
        ({"out": torch.zeros(2, 3, 192)[..., :96]}, "out: expected to be contiguous"),
        ({"out": X.to("meta")}, "out: expected .* on cpu, not .* on meta"),
        ({"sum_out": X[0]}, r"sum_out: expected torch.float32 \[2, 3, 96\]"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        channel_norm(**{"x": X.clone(), "gamma": torch.ones(96), **change})


def test_traces_without_running() -> None:
    arguments = CASES[3].arguments(torch.float32)
    names = ("x", "gamma", "bias", "residual", "silu", "sum_out")
    torch.library.opcheck(
        torch.ops.liveavatar_kernels.channel_norm.default,
        (*(arguments[name] for name in names), torch.zeros_like(arguments["x"]), "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )
    total, values = channel_norm(X.to("meta"), torch.ones(96, device="meta"), bias=torch.ones(96, device="meta"))
    assert total.is_meta
    assert values.shape == total.shape == X.shape


def test_full_size_is_twelve_pictures() -> None:
    first, values_only = (case for case in model_cases(WAN_14B) if case.shape == (12, 704 * 384))
    assert first.channels == values_only.channels == 96
    assert first.bytes == 12 * 704 * 384 * 96 * 2 * 4
    assert values_only.bytes == 12 * 704 * 384 * 96 * 2 * 2


def test_no_lane_computes_for_nothing_at_the_models_sizes() -> None:
    specs = kernel.aot_specs(WAN_14B, 90)
    assert {spec.constexprs["CHANNELS"] for spec in specs} == {96, 192, 384}
    assert all(spec.constexprs["WIDTH"] * spec.constexprs["PARTS"] == spec.constexprs["CHANNELS"] for spec in specs)
