"""Ring attention in Gluon on Hopper: right for every dense case, over memory that holds NaN, whole and in parts.

Imports nothing beyond torch, triton and pytest: the machine with the GPU has no more.
"""

from typing import Any

import pytest
import torch
from liveavatar_kernels.model_sizes import WAN_14B
from liveavatar_kernels.ring_attention import OP, ring_attention, tiling
from liveavatar_kernels.ring_attention.cases import CASES, Case, model_cases
from support import relative_error
from torch import Tensor

GPU = torch.device("cuda:0")
REASON = OP["gluon"].absent(GPU) if torch.cuda.is_available() else "no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
DENSE = [case for case in CASES if not case.quantized]
LARGE = [case for case in model_cases(WAN_14B) if not case.quantized]
by_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def by_case(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def _exact(arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    caches = {
        name: arguments[name]._replace(k=arguments[name].k.to(dtype), v=arguments[name].v.to(dtype))
        for name in ("ring", "sink")
    }
    wide = {**arguments, **caches, "q": arguments["q"].to(dtype)}
    return ring_attention(**wide, implementation="reference")


def _gluon(arguments: dict[str, Any], processors: int | None = None) -> Tensor:
    from liveavatar_kernels.ring_attention import gluon

    return gluon.ring_attention(**arguments, processors=processors)


@by_dtype
@by_case(DENSE)
def test_is_as_exact_as_torch_at_that_precision(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype, "cuda:0")
    exact = _exact(arguments, torch.float64)
    out = ring_attention(**arguments, implementation="gluon")
    plain = ring_attention(**arguments, implementation="sdpa")
    assert out.dtype == dtype
    assert relative_error(out, exact) <= 2 * relative_error(plain, exact)


@by_dtype
@pytest.mark.parametrize("processors", [2, 5, 64, 132])
@by_case(DENSE)
def test_parts_give_the_same(case: Case, processors: int, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(tiling, "_LEAST_TILES", 1)
    arguments = case.arguments(dtype, "cuda:0")
    exact = _exact(arguments, torch.float64)
    out = _gluon(arguments, processors)
    plain = ring_attention(**arguments, implementation="sdpa")
    assert relative_error(out, exact) <= 2 * relative_error(plain, exact)
    assert out.equal(_gluon(arguments, processors)), "not deterministic"


@by_dtype
@by_case(LARGE)
def test_model_sizes(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype, "cuda:0")
    exact = _exact(arguments, torch.float32)
    out = ring_attention(**arguments, implementation="gluon")
    plain = ring_attention(**arguments, implementation="sdpa")
    assert relative_error(out, exact) <= 2 * relative_error(plain, exact)
    for _ in range(20):
        assert ring_attention(**arguments, implementation="gluon").equal(out), "a race between producer and consumers"
