"""Streams without end: float32 streams far out against the same stream computed in float64 throughout."""

import copy

import numpy as np
import pytest
import torch
from liveavatar_kernels.cache import FIXED, MOVED, RING
from liveavatar_kernels.e4m3 import E4M3, padded_to_tile
from support import CPU, relative_error

from liveavatar_engine.config import StreamGeometry
from liveavatar_engine.denoise.caches import CacheLayout
from liveavatar_engine.denoise.executor import Denoiser, StepExecutor
from liveavatar_engine.denoise.noise import BlockNoise
from liveavatar_engine.denoise.positions import Place, Scene, StepPositions
from liveavatar_engine.denoise.schedule import flow_match_schedule
from liveavatar_engine.denoise.stream import Conditions, LatentStream, SinkPolicy
from liveavatar_engine.model import Network
from liveavatar_engine.model.attention import RingView
from liveavatar_engine.model.rope import AxisFrequencies


def _latents(network: Network, first_frame: int, blocks: int) -> list[torch.Tensor]:
    """A stream with an update of the sink and a full, wrapped ring, in the network's dtype."""
    geometry = StreamGeometry(network.config, 64, 80)
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(network.dtype)  # noqa: E731
    noise = BlockNoise(geometry, 5)
    channels, _, height, width = geometry.block_shape
    conditions = Conditions(
        draw(5, network.config.text_dim), draw(channels, 1, height, width), draw(channels, 19, height, width)
    )
    executor = StepExecutor(Denoiser(network, flow_match_schedule(4)), geometry)
    stream = LatentStream(executor, 0, conditions, SinkPolicy("random", 2, seed=3), first_frame=first_frame)
    states = draw(1, network.config.audio_layers, network.config.audio_dim, 12)
    return [stream.next_block(noise.block(index), states) for index in range(blocks)]


@pytest.mark.parametrize("first_frame", [0, 44_998, 1_000_000, 10**12], ids=lambda n: f"from {n}")
def test_latents_equal_exact_angles(first_frame: int, network: Network) -> None:
    ours = _latents(network, first_frame, blocks=6)
    exact = _latents(copy.deepcopy(network).double(), first_frame, blocks=6)
    assert exact[0].dtype == torch.float64
    for block, (latents, truth) in enumerate(zip(ours, exact, strict=True)):
        assert relative_error(latents, truth) <= 1e-5, f"block {block}"


def test_positions_matter(network: Network) -> None:
    near, far = (_latents(network, first, blocks=2) for first in (0, 1_000_000))
    assert relative_error(far[1], near[1]) > 1e-4


def test_angles_of_a_late_block_are_exact() -> None:
    """Against Python's integers reduced modulo a turn, where the frequency is 1."""
    angle = AxisFrequencies.of(32).time_angles([123_456_789])[0, 0]
    assert abs(float(angle.cos()) - np.cos(np.longdouble(123_456_789))) < 1e-8


class _Positions:
    """A stream's places with one step, in slot 1."""

    def __init__(self, geometry: StreamGeometry, dtype: torch.dtype = torch.float32) -> None:
        self._geometry = geometry
        self._positions = StepPositions(geometry, CacheLayout.of(geometry, dtype == E4M3), 1, CPU, torch.float32)

    def view(self, block: int, distance: int = 10) -> RingView:
        place = Place(1, block, block * self._geometry.frames_per_block, distance, Scene(2, 3, 5, 7))
        self._positions.write([place], torch.zeros(self._geometry.block_shape))
        (view,) = self._positions.view(slice(0, 1)).rings
        return view


@pytest.mark.parametrize("dtype", [torch.float32, E4M3], ids=str)
def test_the_ring_is_written_in_order_and_wraps(dtype: torch.dtype, network: Network) -> None:
    geometry = StreamGeometry(network.config, 64, 64)
    positions = _Positions(geometry, dtype)
    places, windows = [], []
    for block in range(9):
        view = positions.view(block)
        places.append(view.at.tolist())
        windows.append(view.window.segments[0].tolist())
    tokens = padded_to_tile(geometry.tokens_per_block) if dtype == E4M3 else geometry.tokens_per_block
    assert places == [[1, start * tokens] for start in [0, 1, 2, 3] * 2 + [0]]
    assert [segments[RING] for segments in windows] == [[0, blocks * tokens] for blocks in [1, 2, 3] + [4] * 6]
    fixed, moved = geometry.fixed_sink_tokens, geometry.reference_segment.tokens
    start = padded_to_tile(fixed) - fixed if dtype == E4M3 else 0
    assert all(segments[FIXED] == [start, fixed] for segments in windows)
    assert all(segments[MOVED] == [start + fixed, moved] for segments in windows)


@pytest.mark.parametrize(
    ("block", "distance", "shift"), [(0, 4, 0), (0, 30, 0), (9, 4, 1), (10, 30, 30), (100, 17, 287)]
)
def test_the_reference_rolls_along_but_never_back(block: int, distance: int, shift: int, network: Network) -> None:
    view = _Positions(StreamGeometry(network.config, 64, 64)).view(block, distance)
    expected = AxisFrequencies.of(network.config.head_dim).time_angles([shift])[0]
    assert torch.allclose(view.window.shift, torch.stack((expected.cos(), expected.sin())).float())


def test_block_angles_are_rewritten_in_place(network: Network) -> None:
    geometry = StreamGeometry(network.config, 64, 80)
    positions = _Positions(geometry)
    frequencies = AxisFrequencies.of(network.config.head_dim)
    storage = positions.view(0).angles.time.data_ptr()
    view = positions.view(7)
    angles = frequencies.angles(range(21, 24), range(geometry.grid_rows), range(geometry.grid_columns))
    cos, sin = view.angles.table()
    assert view.angles.time.data_ptr() == storage
    assert torch.equal(cos, angles.cos().float())
    assert torch.equal(sin, angles.sin().float())
