"""Streaming encode and decode: any chunking, still images, bounded history."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liveavatar_engine.vae.layers import History
from liveavatar_engine.vae.vae import Vae, to_uint8


def _latents(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(16, frames, 8, 6, generator=torch.Generator().manual_seed(seed))


@given(cuts=st.sets(st.integers(1, 6)))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_chunking_decodes_the_same_bits(vae: Vae, cuts: set[int]) -> None:
    latents = _latents(7)
    stream = vae.decoder_stream()
    edges = [0, *sorted(cuts), 7]
    chunks = [stream.decode(latents[:, a:b]) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(chunks, dim=1), vae.decoder_stream().decode(latents))


def test_frame_counts(vae: Vae) -> None:
    stream = vae.decoder_stream()
    assert stream.decode(_latents(1)).shape == (3, 1, 64, 48)
    assert stream.decode(_latents(3)).shape == (3, 12, 64, 48)


def test_later_latents_do_not_change_earlier_frames(vae: Vae) -> None:
    first, second = _latents(5), _latents(5)
    second[:, 3:] = 0
    a, b = (vae.decoder_stream().decode(latents) for latents in (first, second))
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.equal(a[:, 9:], b[:, 9:])


def test_streams_do_not_share_history(vae: Vae) -> None:
    one, other = vae.decoder_stream(), vae.decoder_stream()
    one.decode(_latents(3, seed=1))
    assert torch.equal(other.decode(_latents(3)), vae.decoder_stream().decode(_latents(3)))


def test_history_does_not_grow(vae: Vae) -> None:
    stream = vae.decoder_stream()

    def held() -> int:
        return sum(frames.untyped_storage().nbytes() for frames in stream._history._frames.values())

    stream.decode(_latents(3))
    before = held()
    for _ in range(5):
        stream.decode(_latents(3))
    assert held() == before


@pytest.mark.parametrize("latents", [1, 2, 20, 45])
def test_a_still_image_equals_its_repetition(vae: Vae, latents: int) -> None:
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    repeated = torch.stack(list(vae.encode([image] * (4 * latents - 3))), dim=1)
    assert torch.equal(vae.encode_still(image, latents), repeated)


def test_a_still_image_is_encoded_until_it_repeats(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    encode_step = vae._encode_step
    monkeypatch.setattr(vae, "_encode_step", lambda *arguments: steps.append(1) or encode_step(*arguments))
    vae.encode_still(torch.zeros(3, 32, 32), 1000)
    assert len(steps) < 40


def test_an_incomplete_group_is_left_out(vae: Vae) -> None:
    assert len(list(vae.encode([torch.zeros(3, 32, 32)] * 8))) == 2


def test_history_equality_is_bitwise() -> None:
    layer, one, other = torch.nn.Identity(), History(), History()
    one.put(layer, torch.zeros(1, 1, 2, 2, 2))
    assert not one.equals(other)
    other.put(layer, torch.zeros(1, 1, 2, 2, 2))
    assert one.equals(other)
    other.put(layer, torch.full((1, 1, 2, 2, 2), 1e-30))
    assert not one.equals(other)


def test_pixels_round_to_nearest() -> None:
    pixels = torch.tensor([-1.0, -0.999, 0.0, 0.003, 1.0]).view(1, 5, 1, 1).expand(3, 5, 1, 1)
    assert to_uint8(pixels)[:, 0, 0, 0].tolist() == [0, 0, 128, 128, 255]
