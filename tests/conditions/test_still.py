"""Pictures are encoded once: what they show decides, not where they come from."""

from __future__ import annotations

import pytest
import torch
from support import CPU

from liveavatar_engine.conditions.still import StillCache, still_conditions
from liveavatar_engine.vae.vae import Vae


def _picture(seed: int, side: int = 32) -> torch.Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def encoded(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Pictures that the VAE was given."""
    seen = []
    encode = vae.encode_still
    monkeypatch.setattr(vae, "encode_still", lambda image, count: seen.append(image) or encode(image, count))
    return seen


def test_the_same_picture_is_encoded_once(vae: Vae, encoded: list[torch.Tensor]) -> None:
    cache = StillCache(vae)
    first = cache.conditions(_picture(1), CPU)
    assert cache.conditions(_picture(1).clone(), CPU) is first
    assert len(encoded) == 1
    expected = still_conditions(vae, _picture(1))
    assert torch.equal(first.reference, expected.reference)
    assert torch.equal(first.motion, expected.motion)
    assert torch.equal(first.priming, expected.priming)


def test_another_picture_or_size_is_encoded(vae: Vae, encoded: list[torch.Tensor]) -> None:
    cache = StillCache(vae)
    for picture in (_picture(1), _picture(2), _picture(1) + 1e-7, torch.zeros(3, 32, 64), torch.zeros(3, 64, 32)):
        cache.conditions(picture, CPU)
    assert len(encoded) == 5


def test_only_the_latest_pictures_are_kept(vae: Vae, encoded: list[torch.Tensor]) -> None:
    cache = StillCache(vae, pictures=2)
    for seed in (1, 2, 1, 3, 1, 2):
        cache.conditions(_picture(seed), CPU)
    assert len(encoded) == 4, "1, 2, 3, and 2 again: it was used before 1"
