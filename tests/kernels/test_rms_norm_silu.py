"""Norm over channels and SiLU, by every implementation."""

from typing import Any

import pytest
import torch
from liveavatar_kernels import KernelUnavailableError
from liveavatar_kernels.model_sizes import WAN_14B
from liveavatar_kernels.rms_norm_silu import rms_norm_silu
from liveavatar_kernels.rms_norm_silu.cases import CASES, Case, in_torch, model_cases
from liveavatar_kernels.tolerances import TIMES_WORSE
from support import relative_error

from liveavatar_engine.vae.layers import ChannelNorm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_implementation = pytest.mark.parametrize("implementation", ["reference", "triton"])


def _exact(arguments: dict[str, Any]) -> torch.Tensor:
    """In float64."""
    x, gamma = arguments["x"].double(), arguments["gamma"].double()
    normed = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30) * gamma
    return normed * normed.sigmoid()


@by_implementation
@by_dtype
@by_case
def test_as_exact_as_torch_at_that_precision(case: Case, dtype: torch.dtype, implementation: str) -> None:
    arguments = case.arguments(dtype)
    out = rms_norm_silu(**arguments, implementation=implementation)
    exact = _exact(arguments)
    assert out.dtype == dtype
    assert relative_error(out, exact) <= TIMES_WORSE * relative_error(in_torch(arguments), exact)


@by_implementation
def test_zeros_stay_zeros(implementation: str) -> None:
    case = next(case for case in CASES if case.zeros)
    out = rms_norm_silu(**case.arguments(torch.float32), implementation=implementation)
    assert not out[: case.zeros].any()


@by_implementation
@pytest.mark.parametrize("size", [1e-15, 1e-13, 1e-8, 1e8])
def test_norms_are_bounded_below_as_in_the_layer(size: float, implementation: str) -> None:
    x = size * torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    gamma = torch.linspace(0.5, 1.5, 96)
    layer = ChannelNorm(96, spatial_axes=0).requires_grad_(False)
    layer.gamma.copy_(gamma)
    expected = torch.nn.functional.silu(layer(x.double()))
    assert relative_error(rms_norm_silu(x, gamma, implementation=implementation), expected) <= 1e-6


def test_float64_stays() -> None:
    arguments = CASES[0].arguments(torch.float64)
    assert relative_error(rms_norm_silu(**arguments), _exact(arguments)) <= 1e-14
    with pytest.raises(KernelUnavailableError, match="no float64"):
        rms_norm_silu(**arguments, implementation="triton")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(2, 3, 96, dtype=torch.int32)}, r"x: expected floating-point \[..., channels\]"),
        ({"x": torch.zeros(96, 3, 5).permute(1, 2, 0)}, "x: expected to be contiguous with channels last"),
        ({"gamma": torch.ones(95)}, r"gamma: expected contiguous \[96\]"),
        ({"gamma": torch.ones(96, 1, 1, 1)}, r"gamma: expected contiguous \[96\]"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        rms_norm_silu(**{**CASES[0].arguments(torch.float32), **change})


def test_traces_without_running() -> None:
    arguments = CASES[0].arguments(torch.float32)
    torch.library.opcheck(
        torch.ops.liveavatar_kernels.rms_norm_silu.default,
        (arguments["x"], arguments["gamma"], "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_full_size_is_twelve_pictures() -> None:
    case = model_cases(WAN_14B)[0]
    assert case.positions == 12 * 704 * 384
    assert case.bytes == 12 * 704 * 384 * 96 * 4
