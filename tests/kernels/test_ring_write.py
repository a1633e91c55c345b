"""Ring write: norms, rotation, slots and wrapping."""

import pytest
import torch
from liveavatar_kernels.ring_write import ring_write
from support import relative_error

from liveavatar_engine.model.rope import AxisFrequencies

HEADS, HEAD_DIM, EPS = 3, 32, 1e-6


def _arguments(tokens: int, ring_tokens: int):
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    weights = [1 + 0.1 * torch.randn(HEADS * HEAD_DIM, generator=generator) for _ in range(2)]
    angles = AxisFrequencies.of(HEAD_DIM).angles([40_000], [3], range(tokens))
    rings = [torch.full((ring_tokens, HEADS, HEAD_DIM), float("nan")) for _ in range(2)]
    return q, k, v, *weights, angles.cos().float(), angles.sin().float(), *rings


def _expected(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    flat = x.double().flatten(1)
    normed = (flat / (flat.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()).view_as(x)
    turned = torch.view_as_complex(normed.unflatten(-1, (-1, 2))) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize("start", [0, 21, 50], ids=["at the head", "inside", "wrapping"])
def test_normalises_rotates_and_stores(start: int) -> None:
    q, k, v, q_weight, k_weight, cos, sin, ring_k, ring_v = _arguments(tokens=13, ring_tokens=55)
    out = ring_write(q, k, v, q_weight, k_weight, cos, sin, ring_k, ring_v, start=start, eps=EPS)
    slots = (torch.arange(13) + start) % 55
    assert relative_error(out, _expected(q, q_weight, cos, sin)) <= 1e-6
    assert relative_error(ring_k[slots], _expected(k, k_weight, cos, sin)) <= 1e-6
    assert ring_v[slots].equal(v)


def test_other_slots_stay_untouched() -> None:
    *arguments, ring_k, ring_v = _arguments(tokens=13, ring_tokens=55)
    ring_write(*arguments, ring_k, ring_v, start=50, eps=EPS)
    untouched = slice((50 + 13) % 55, 50)
    assert ring_k[untouched].isnan().all()
    assert ring_v[untouched].isnan().all()


def test_bf16_rounds_once_per_stage() -> None:
    q, k, v, q_weight, k_weight, cos, sin, _, _ = _arguments(tokens=13, ring_tokens=55)
    low = [tensor.bfloat16() for tensor in (q, k, v)]
    ring_k, ring_v = (torch.full((55, HEADS, HEAD_DIM), float("nan"), dtype=torch.bfloat16) for _ in range(2))
    out = ring_write(*low, q_weight, k_weight, cos, sin, ring_k, ring_v, start=0, eps=EPS)
    assert relative_error(out.float(), _expected(low[0], q_weight, cos, sin)) <= 2 * 2**-8
    assert ring_v[:13].equal(low[2])
