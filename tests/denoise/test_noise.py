"""Noise and sink distances: functions of seed and block, whatever the order."""

import pytest
import torch

from liveavatar_engine.config import StreamGeometry
from liveavatar_engine.denoise.noise import MAX_SEED, BlockNoise, check_seed, sink_distances
from liveavatar_engine.errors import ConfigError


def test_a_clip_is_one_draw_from_seed_plus_clip(network) -> None:
    geometry = StreamGeometry(network.config, 64, 64)
    noise = BlockNoise(geometry, 42)
    second_clip = torch.randn(16, 12, 8, 8, generator=torch.Generator().manual_seed(43))
    assert torch.equal(noise.block(5), second_clip[:, 3:6])
    assert torch.equal(noise.block(4), second_clip[:, :3])


def test_blocks_can_be_drawn_in_any_order(network) -> None:
    geometry = StreamGeometry(network.config, 64, 64)
    forward, backward = BlockNoise(geometry, 1), BlockNoise(geometry, 1)
    drawn = [forward.block(index).clone() for index in range(9)]
    assert all(torch.equal(backward.block(index), drawn[index]) for index in reversed(range(9)))


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.5, "7", True, None], ids=repr)
def test_bad_seeds_are_named(seed, network) -> None:
    with pytest.raises(ConfigError, match="seed must be an integer, 0 to"):
        check_seed(seed)


def test_the_largest_seed_has_room_for_clips(network) -> None:
    BlockNoise(StreamGeometry(network.config, 64, 64), MAX_SEED).block(10**9)


def test_random_distances_cover_the_reference_range() -> None:
    drawn = [distance for block in range(500) for distance in sink_distances("random", 9, block, 4)]
    assert set(drawn) == set(range(4, 31))
    assert sink_distances("random", 9, 123, 4) == sink_distances("random", 9, 123, 4)
    assert sink_distances("random", 9, 123, 4) != sink_distances("random", 10, 123, 4)


def test_fixed_distance() -> None:
    assert sink_distances(17, 9, 5, 3) == [17, 17, 17]
