"""A golden `dit` case through the engine's own stream, on any device."""

from __future__ import annotations

from typing import Any

import torch
from support import GoldenCase
from torch import Tensor

from liveavatar_engine.config import StreamGeometry
from liveavatar_engine.config.geometry import LATENT_FRAME_STRIDE, LATENT_STRIDE
from liveavatar_engine.denoise.diagonal import open_stream
from liveavatar_engine.denoise.executor import Denoiser, StepExecutor
from liveavatar_engine.denoise.schedule import Schedule
from liveavatar_engine.denoise.stream import Conditions, LatentStream, SinkPolicy
from liveavatar_engine.model import Network
from liveavatar_engine.model.rope import AxisFrequencies


class GoldenStream:
    """A golden `dit` case, or its first blocks, through the engine's own stream; caches in its dtype or in e4m3.

    Further settings are the executor's.
    """

    def __init__(
        self,
        case: GoldenCase,
        network: Network,
        cache_dtype: torch.dtype | None = None,
        blocks: int | None = None,
        **settings: Any,
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
        executor = StepExecutor(Denoiser(network, schedule), self.geometry, cache_dtype=cache_dtype, **settings)
        self.layers = executor.arena.layers
        mask = case.tensors.get("actor_mask")
        stream = open_stream(
            executor,
            0,
            Conditions(
                case["context"],
                case["ref_latents"][0],
                case["motion_latents"][0],
                None if mask is None else mask[:, : self.geometry.frames_per_block].flatten(2, 3),
            ),
            SinkPolicy(parameters["relative_dist"], parameters.get("aas_after"), seed=0),
            first_frame=parameters.get("frame_offset", 0),
            observe=lambda block, step, velocity: self.velocities.update({(block, step): velocity.clone()}),
        )
        self.latents: list[Tensor] = []
        self._keep_sink(stream, 0)
        for block in range(blocks or parameters["num_blocks"]):
            self.latents += self._push(stream, block)
            self._keep_sink(stream, block + 1)
        self.latents += stream.drain()

    def _push(self, stream: LatentStream, block: int) -> list[Tensor]:
        frames = slice(block * self.geometry.frames_per_block, (block + 1) * self.geometry.frames_per_block)
        columns = slice(frames.start * LATENT_FRAME_STRIDE, frames.stop * LATENT_FRAME_STRIDE)
        return stream.push(
            self.case["noise"][:, frames], self.case["audio"][..., columns], self.case["cond_states"][0, :, frames]
        )

    def _keep_sink(self, stream: LatentStream, after_blocks: int) -> None:
        slot = stream.scene.sink
        self.sinks[after_blocks] = [(layer.sink.k[slot].clone(), layer.sink.v[slot].clone()) for layer in self.layers]

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
