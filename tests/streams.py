"""Streams with random conditions and inputs, for tests of how blocks are run."""

from __future__ import annotations

import torch
from torch import Tensor

from liveavatar_engine.config import StreamGeometry
from liveavatar_engine.denoise.diagonal import open_stream
from liveavatar_engine.denoise.executor import Denoiser, StepExecutor
from liveavatar_engine.denoise.schedule import flow_match_schedule
from liveavatar_engine.denoise.stream import Conditions, LatentStream, SinkPolicy
from liveavatar_engine.model import Network

STEPS = 3


class Streams:
    """Streams of one executor, of `size` pixels (height and width), with inputs drawn from seeds."""

    def __init__(
        self,
        network: Network,
        *,
        sessions: int = 1,
        steps: int = STEPS,
        clean: bool = False,
        part: range | None = None,
        size: tuple[int, int] = (64, 80),
        **settings,
    ):
        self.network = network
        self.geometry = StreamGeometry(network.config, *size)
        denoiser = Denoiser(network, flow_match_schedule(steps), clean_pass=clean, part=part)
        self.executor = StepExecutor(denoiser, self.geometry, sessions=sessions, **settings)

    def draw(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def open(self, session: int = 0, seed: int = 0, update_after: int | None = 2, actors: int = 1) -> LatentStream:
        channels, _, height, width = self.geometry.block_shape
        masks = None if actors == 1 else self.draw(seed, actors, 1, self.geometry.tokens_per_frame, 1).gt(0).float()
        conditions = Conditions(
            self.context(seed),
            self.draw(seed, channels, 1, height, width),
            self.draw(seed, channels, 19, height, width),
            masks,
        )
        return open_stream(self.executor, session, conditions, SinkPolicy("random", update_after, seed))

    def context(self, seed: int) -> Tensor:
        return self.draw(seed, 3 + seed % 5, self.network.config.text_dim)

    def push(
        self, stream: LatentStream, seed: int = 0, actors: int = 1, pose: bool = False, entering: Tensor | None = None
    ) -> list[Tensor]:
        """The stream's next block, from noise or from what enters in its place."""
        config, index = self.network.config, stream.block
        shape = self.geometry.block_shape
        states = self.draw(1000 * seed + index, actors, config.audio_layers, config.audio_dim, 12)
        latents = self.draw(2000 * seed + index, config.cond_dim, *shape[1:]) if pose else None
        noise = self.draw(3000 * seed + index, *shape) if entering is None else entering
        return stream.push(noise, states, latents)

    def run(self, blocks: int, seed: int = 0, actors: int = 1, pose: bool = False, **opening) -> list[Tensor]:
        stream = self.open(seed=seed, actors=actors, **opening)
        made = [latents for _ in range(blocks) for latents in self.push(stream, seed, actors, pose)]
        return made + stream.drain()
