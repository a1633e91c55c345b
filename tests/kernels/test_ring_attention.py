"""Ring attention against dense float64 attention over explicitly moved keys."""

import pytest
import torch
from liveavatar_kernels.ring_attention import reference as implementation
from liveavatar_kernels.ring_attention import ring_attention
from support import relative_error

from liveavatar_engine.model.rope import AxisFrequencies

CASES = {
    # heads, head_dim, queries, ring, fixed, moved, shift
    "square": (2, 32, 48, 192, 40, 16, 0),
    "awkward lengths": (3, 64, 63, 1000, 37, 11, 137),
    "one query": (1, 128, 1, 7, 0, 5, 30),
    "no motion tokens": (2, 32, 20, 20, 0, 9, 1_000_000),
    "head of 128": (2, 128, 33, 129, 24, 31, 4),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_dense_attention_over_moved_keys(case) -> None:
    heads, head_dim, queries, ring, fixed, moved, shift = case
    generator = torch.Generator().manual_seed(1)
    q, k, v, sink_k, sink_v = (
        torch.randn(n, heads, head_dim, generator=generator)
        for n in (queries, ring, ring, fixed + moved, fixed + moved)
    )
    angles = AxisFrequencies.of(head_dim).time_angles([shift])[0]
    out = ring_attention(
        q, k, v, sink_k, sink_v, fixed_tokens=fixed, shift_cos=angles.cos().float(), shift_sin=angles.sin().float()
    )
    assert relative_error(out, _dense(q, k, v, sink_k, sink_v, fixed, angles)) <= 1e-6


def test_tiles_give_the_same_as_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(n, 2, 32, generator=generator) for n in (50, 80, 80, 12, 12)]
    shift = torch.zeros(6)
    arguments = {"fixed_tokens": 5, "shift_cos": shift.cos(), "shift_sin": shift.sin()}
    whole = ring_attention(*tensors, **arguments)
    monkeypatch.setattr(implementation, "_LOGIT_BYTES", 7 * 2 * 92 * 4)
    assert relative_error(ring_attention(*tensors, **arguments), whole) <= 1e-6


def test_low_precision_is_as_good_as_its_inputs() -> None:
    generator = torch.Generator().manual_seed(3)
    exact = [torch.randn(n, 2, 64, generator=generator) for n in (30, 60, 60, 14, 14)]
    angles = AxisFrequencies.of(64).time_angles([45])[0]
    arguments = {"fixed_tokens": 6, "shift_cos": angles.cos().float(), "shift_sin": angles.sin().float()}
    rounded = [tensor.bfloat16() for tensor in exact]
    truth = _dense(*(tensor.double() for tensor in rounded), 6, angles)
    # the counter-rotated query is rounded to bf16 once more, as is the output
    assert relative_error(ring_attention(*rounded, **arguments).float(), truth) <= 2 * 2**-8


def _dense(q, k, v, sink_k, sink_v, fixed, angles):
    """float64 attention over `[ring | fixed | moved]` with the moved keys rotated by the shift."""
    turned = torch.view_as_complex(sink_k[fixed:].double().unflatten(-1, (-1, 2)).contiguous())
    turned[..., : len(angles)] *= torch.polar(torch.ones_like(angles), angles)
    keys = torch.cat((k.double(), sink_k[:fixed].double(), torch.view_as_real(turned).flatten(-2)))
    values = torch.cat((v, sink_v)).double()
    logits = torch.einsum("qhd,khd->hqk", q.double(), keys) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), values)
