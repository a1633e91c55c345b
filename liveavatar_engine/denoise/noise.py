"""Noise of a stream: drawn clip by clip on the CPU, so that every device and layout gets the same."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..config import StreamGeometry
from ..config.engine import SINK_DISTANCES
from ..errors import ConfigError

MAX_SEED = 2**62
"""Room above it for one further seed per clip of an endless stream."""


def check_seed(seed: int) -> int:
    """`seed` itself, or a ConfigError when it is no integer in 0..2^62."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed must be an integer, 0 to {MAX_SEED}, not {seed!r}")
    return int(seed)


class BlockNoise:
    """Gaussian noise by block: clip r is one draw from a generator seeded with seed + r, sliced by block."""

    def __init__(self, geometry: StreamGeometry, seed: int) -> None:
        self._geometry = geometry
        self._seed = check_seed(seed)
        self._clip_index = -1
        self._clip = torch.empty(0)

    def block(self, index: int) -> Tensor:
        """Noise of block `index`: float32 [channels, frames, latent_height, latent_width], on the CPU."""
        self.prepare(index)
        within = index % self._geometry.blocks_per_clip
        frames = self._geometry.frames_per_block
        return self._clip[:, within * frames : (within + 1) * frames]

    def prepare(self, index: int) -> None:
        """Draw what `block(index)` needs, for instance while a device is busy with the block before."""
        clip = index // self._geometry.blocks_per_clip
        if clip != self._clip_index:
            channels, _, height, width = self._geometry.block_shape
            generator = torch.Generator().manual_seed(self._seed + clip)
            self._clip = torch.randn(channels, self._geometry.ring_frames, height, width, generator=generator)
            self._clip_index = clip


def sink_distances(policy: str | int, seed: int, block: int, steps: int) -> list[int]:
    """Temporal distance of the reference image for each step of a block, in latent frames.

    A fixed `policy` is that distance; "random" draws from the reference's range, from the seed and the block alone, so
    that any block of a stream can be computed anywhere.
    """
    if policy != "random":
        return [int(policy)] * steps
    low, high = SINK_DISTANCES
    return np.random.default_rng([seed, block]).integers(low, high, size=steps, endpoint=True).tolist()
