"""Velocities, latents and sink caches of whole streams against the reference."""

import pytest
import torch
from support import CPU, GoldenCase, golden_cases, relative_error
from torch import Tensor

from liveavatar_engine.config import StreamGeometry
from liveavatar_engine.config.geometry import LATENT_FRAME_STRIDE, LATENT_STRIDE
from liveavatar_engine.denoise.caches import CacheArena, StreamCaches
from liveavatar_engine.denoise.schedule import Schedule, flow_match_schedule
from liveavatar_engine.denoise.stream import Denoiser, LatentStream, SinkPolicy
from liveavatar_engine.model import Network
from liveavatar_engine.model.rope import AxisFrequencies
from liveavatar_engine.weights.network import load_network

BF16_ERROR = 2 * 2**-8
"""Two units of bf16's precision; one is what the engine measures on a CPU."""


class GoldenStream:
    """A golden `dit` case, or its first blocks, through the engine's own stream; caches in its dtype or in e4m3."""

    def __init__(
        self, case: GoldenCase, network: Network, cache_dtype: torch.dtype | None = None, blocks: int | None = None
    ) -> None:
        parameters = case.parameters
        self.case = case
        self.geometry = StreamGeometry(
            network.config,
            parameters["lat_h"] * LATENT_STRIDE,
            parameters["lat_w"] * LATENT_STRIDE,
            parameters["frames_per_block"],
            parameters["window_frames"],
        )
        self.velocities: dict[tuple[int, int], Tensor] = {}
        self.sinks: dict[int, list[tuple[Tensor, Tensor]]] = {}
        schedule = Schedule(tuple(case["timesteps"].tolist()), tuple(case["sigmas"].tolist()))
        arena = CacheArena(self.geometry, schedule.steps, 1, cache_dtype or network.dtype, CPU)
        self.caches: StreamCaches = arena.caches(0)
        mask = case.tensors.get("actor_mask")
        self.latents: list[Tensor] = []
        with torch.inference_mode():
            stream = LatentStream(
                Denoiser(network, schedule),
                self.geometry,
                self.caches,
                text=network.text_keys(case["context"]),
                reference=case["ref_latents"][0],
                motion=case["motion_latents"][0],
                policy=SinkPolicy(parameters["relative_dist"], parameters.get("aas_after"), seed=0),
                actor_mask=None if mask is None else mask[:, : self.geometry.frames_per_block].flatten(2, 3),
                first_frame=parameters.get("frame_offset", 0),
                observe=lambda block, step, velocity: self.velocities.update({(block, step): velocity}),
            )
            self._keep_sink(0)
            for block in range(blocks or parameters["num_blocks"]):
                self.latents.append(self._next(stream, block))
                self._keep_sink(block + 1)

    def _next(self, stream: LatentStream, block: int) -> Tensor:
        frames = slice(block * self.geometry.frames_per_block, (block + 1) * self.geometry.frames_per_block)
        columns = slice(frames.start * LATENT_FRAME_STRIDE, frames.stop * LATENT_FRAME_STRIDE)
        return stream.next_block(
            self.case["noise"][:, frames], self.case["audio"][..., columns], self.case["cond_states"][0, :, frames]
        )

    def _keep_sink(self, after_blocks: int) -> None:
        self.sinks[after_blocks] = [(layer.k[0].clone(), layer.v[0].clone()) for layer in self.caches.sink]

    def reference_order(self, stored: Tensor) -> Tensor:
        """Sink tokens as the reference orders them, [reference | motion], with a batch axis."""
        fixed = self.geometry.fixed_sink_tokens
        return torch.cat((stored[fixed:], stored[:fixed]))[None]

    def unrotated(self, keys: Tensor) -> Tensor:
        """Keys as they were before RoPE, which the reference caches; ours are stored rotated."""
        frequencies = AxisFrequencies.of(self.geometry.model.head_dim)
        segments = (*self.geometry.fixed_sink, self.geometry.reference_segment)
        angles = torch.cat([frequencies.angles(s.times, s.rows, s.columns) for s in segments])
        pairs = torch.view_as_complex(keys.double().unflatten(-1, (-1, 2)))
        turn = torch.polar(torch.ones_like(angles), -angles)[:, None]
        return torch.view_as_real(pairs * turn).flatten(-2)


@pytest.fixture(scope="module", params=golden_cases("dit"))
def stream(request, golden_network) -> GoldenStream:
    return GoldenStream(request.param, golden_network)


def test_latents(stream: GoldenStream) -> None:
    for block, latents in enumerate(stream.latents):
        assert relative_error(latents, stream.case["latents"][block]) <= 1e-5, f"block {block}"


@pytest.mark.parametrize("case", golden_cases("dit"))
def test_latents_in_bf16(case: GoldenCase, golden_checkpoint) -> None:
    low = GoldenStream(case, load_network(golden_checkpoint, None, torch.bfloat16, CPU))
    for block, latents in enumerate(low.latents):
        assert relative_error(latents, case["latents"][block]) <= BF16_ERROR, f"block {block}"


def test_velocities(stream: GoldenStream) -> None:
    if "velocities" not in stream.case.tensors:
        pytest.skip("the case keeps no velocities")
    kept = stream.case["velocity_blocks"].tolist()
    assert kept
    for row, block in enumerate(kept):
        for step, expected in enumerate(stream.case["velocities"][row]):
            assert relative_error(stream.velocities[block, step], expected) <= 1e-5, f"block {block} step {step}"


def test_sink_keys_and_values(stream: GoldenStream) -> None:
    names = [name for name in stream.case.tensors if name.startswith(("sink_k_layer", "sink_v_layer"))]
    if not names:
        pytest.skip("the case keeps no sink")
    for name in names:
        keys, values = stream.sinks[0][int(name.rpartition("layer")[2])]
        ours = stream.unrotated(keys) if name.startswith("sink_k") else values
        assert relative_error(stream.reference_order(ours), stream.case[name]) <= 1e-5, name


def test_sink_after_its_update(stream: GoldenStream) -> None:
    update_after = stream.case.parameters.get("aas_after")
    before, after = stream.sinks[0], stream.sinks[stream.case.parameters["num_blocks"]]
    if update_after is None:
        assert all(a.equal(b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))
        return
    assert stream.sinks[update_after][0][1].equal(before[0][1]), "the sink changed too early"
    if "sink_v_after_aas" in stream.case.tensors:
        expected = stream.case["sink_v_after_aas"]
        errors = [relative_error(stream.reference_order(values), expected) for _, values in after]
        assert min(errors) <= 1e-5


@pytest.mark.parametrize("case", golden_cases("dit") + golden_cases("pipeline"))
def test_schedule(case: GoldenCase) -> None:
    ours = flow_match_schedule(case.parameters["steps"], case.parameters.get("shift", 3))
    assert list(ours.timesteps) == case["timesteps"].tolist()
    assert list(ours.sigmas) == case["sigmas"].tolist()
