"""Actor masks and pose latents."""

import numpy as np
import pytest
import torch

from liveavatar_engine.conditions.actors import actor_mask
from liveavatar_engine.conditions.pose import PoseStream
from liveavatar_engine.config import StreamGeometry
from liveavatar_engine.errors import InputError


@pytest.fixture
def geometry(network) -> StreamGeometry:
    return StreamGeometry(network.config, 160, 320)


def _box(geometry: StreamGeometry, left: int, right: int) -> np.ndarray:
    mask = np.zeros((geometry.height, geometry.width), bool)
    mask[32:128, left:right] = True
    return mask


def test_background_belongs_to_all_and_actors_to_themselves(geometry: StreamGeometry) -> None:
    weights = actor_mask([_box(geometry, 0, 112), _box(geometry, 208, 320)], geometry)
    left, right = weights.view(2, geometry.grid_rows, geometry.grid_columns)
    assert weights.shape == (2, 1, geometry.tokens_per_frame, 1)
    assert left[5, 2] == 1
    assert right[5, 2] == 0
    assert right[5, 17] == 1
    assert left[5, 17] == 0
    assert left[5, 10] == right[5, 10] == 1


def test_masks_grow_by_a_tenth(geometry: StreamGeometry) -> None:
    weights = actor_mask([_box(geometry, 0, 160), _box(geometry, 240, 320)], geometry)
    others = 1 - weights[1].view(geometry.grid_rows, geometry.grid_columns)
    assert others[2:8, :10].all(), "the first actor's box"
    assert others[1:9, :11].all(), "a tenth of ten tokens more on each side"
    assert others.sum() == 8 * 11


def test_a_single_actor_speaks_everywhere(geometry: StreamGeometry) -> None:
    assert actor_mask([_box(geometry, 0, 112)], geometry).all()


def test_a_mask_too_small_for_the_grid(geometry: StreamGeometry) -> None:
    tiny = np.zeros((geometry.height, geometry.width), bool)
    tiny[80, 100] = True
    with pytest.raises(InputError, match="actor mask 2 of 2: nothing of it is left"):
        actor_mask([_box(geometry, 0, 112), tiny], geometry)


def _pose_video(frames: int, geometry: StreamGeometry) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (geometry.height, geometry.width, 3), np.uint8) for _ in range(frames)]


@pytest.fixture
def small(network) -> StreamGeometry:
    return StreamGeometry(network.config, 64, 64)


def test_pose_clips_are_encoded_behind_a_copy_of_their_first_frame(vae, small: StreamGeometry) -> None:
    video = _pose_video(96, small)
    stream = PoseStream(vae, iter(video), small)
    blocks = [stream.block(index) for index in range(8)]
    second = [torch.tensor(f).permute(2, 0, 1).float() / 255 * 2 - 1 for f in [video[48], *video[48:]]]
    expected = torch.stack(list(vae.encode(second)), dim=1)[:, 1:]
    assert torch.equal(torch.cat(blocks[4:], dim=1), expected)


def test_pose_video_that_ends_goes_black_and_costs_nothing_more(vae, small: StreamGeometry, monkeypatch) -> None:
    stream = PoseStream(vae, iter(_pose_video(10, small)), small)
    for index in range(8):
        stream.block(index)
    black = torch.stack(list(vae.encode([torch.full((3, 64, 64), -1.0)] * 49)), dim=1)[:, 1:]
    monkeypatch.setattr(vae, "encode", lambda frames: pytest.fail("encoded black again"))
    assert torch.equal(stream.block(8), black[:, :3])
    assert torch.equal(stream.block(399), black[:, 9:])
