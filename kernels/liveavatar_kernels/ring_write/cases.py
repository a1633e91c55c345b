"""Shapes of ring_write, declared once for tests, benchmarks and warm-up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache import KeyValueCache
from ..e4m3 import E4M3, KV_TILE, padded_to_tile
from ..model_sizes import ModelSizes
from ..rotation import Angles

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """A block of `frames` x `frame_tokens` written at `start` of slot 1 of 2; perhaps its q and k come normalised."""

    name: str
    heads: int
    head_dim: int
    frames: int
    frame_tokens: int
    cache_tokens: int
    start: int
    quantized: bool = False
    normalised: bool = False

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens

    @property
    def bytes(self) -> int:
        """Least traffic at two bytes an element: q, k and v read, q, K and V written."""
        stored = 1 if self.quantized else 2
        return self.tokens * self.heads * self.head_dim * (3 * 2 + 2 + 2 * stored)

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of the op: random, except caches, which hold NaN."""
        generator = torch.Generator().manual_seed(seed)
        dim = self.heads * self.head_dim
        fused = torch.randn(self.tokens, 3 * dim, generator=generator).to(device, dtype)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in fused.split(dim, dim=-1))
        q_weight, k_weight = (1 + 0.1 * torch.randn(2, dim, generator=generator)).to(device, dtype)
        time_pairs = self.head_dim // 2 - 2 * (self.head_dim // 6)
        return {
            "q": q,
            "k": k,
            "v": v,
            "q_weight": None if self.normalised else q_weight,
            "k_weight": None if self.normalised else k_weight,
            "angles": Angles(
                _turns(self.frames, time_pairs, generator).to(device),
                _turns(self.frame_tokens, self.head_dim // 2 - time_pairs, generator).to(device),
            ),
            "cache": self._cache(dtype, device),
            "at": torch.tensor([1, self.start], dtype=torch.int32, device=device),
            "eps": EPS,
        }

    def slots(self) -> Tensor:
        """Cache tokens that the block's tokens go to, in order."""
        return (torch.arange(self.tokens) + self.start) % self.cache_tokens

    def _cache(self, dtype: torch.dtype, device: str) -> KeyValueCache:
        shape = (2, self.cache_tokens, self.heads, self.head_dim)
        nan = float("nan")
        if not self.quantized:
            k, v = torch.full((2, *shape), nan, dtype=dtype, device=device)
            return KeyValueCache(k, v)
        k, v = (torch.full(shape, nan, device=device).to(E4M3) for _ in range(2))
        return KeyValueCache(
            k,
            v.permute(0, 2, 3, 1).contiguous(),
            torch.full((2, self.heads, self.cache_tokens), nan, device=device),
            torch.full((2, self.heads, self.cache_tokens // KV_TILE), nan, device=device),
        )


def in_torch(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Rotated q and k by the same maths in torch at the arguments' precision: the yardstick for a kernel's error."""
    cos, sin = (table.to(arguments["q"].dtype)[:, None] for table in arguments["angles"].table())

    def rotated(x: Tensor, weight: Tensor | None) -> Tensor:
        flat = x.flatten(-2)
        normed = flat if weight is None else F.rms_norm(flat, flat.shape[-1:], weight, EPS)
        even, odd = normed.view_as(x).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    return rotated(arguments["q"], arguments["q_weight"]), rotated(arguments["k"], arguments["k_weight"])


def model_cases(sizes: ModelSizes) -> tuple[Case, ...]:
    """The block of every picture size, into the last slot of a full ring, and its share of the heads on two GPUs."""
    cases = []
    for tokens in sizes.block_tokens:
        frame_tokens = tokens // sizes.block_frames
        case = Case(
            f"{tokens} tokens",
            sizes.heads,
            sizes.head_dim,
            sizes.block_frames,
            frame_tokens,
            sizes.ring_blocks * tokens,
            (sizes.ring_blocks - 1) * tokens,
        )
        padded = padded_to_tile(tokens)
        e4m3 = replace(case, cache_tokens=sizes.ring_blocks * padded, start=(sizes.ring_blocks - 1) * padded)
        cases += [case, replace(e4m3, name=f"{tokens} tokens, e4m3 cache", quantized=True)]
        cases.append(replace(case, name=f"{tokens} tokens, half the heads", heads=sizes.heads // 2, normalised=True))
    return tuple(cases)


def _turns(rows: int, pairs: int, generator: torch.Generator) -> Tensor:
    angles = torch.rand(rows, pairs, generator=generator, dtype=torch.float64) * 1e4
    return torch.stack((angles.cos(), angles.sin()), dim=1).float()


CASES = (
    Case("at the head", heads=3, head_dim=32, frames=3, frame_tokens=7, cache_tokens=84, start=0),
    Case("inside", heads=2, head_dim=64, frames=2, frame_tokens=5, cache_tokens=63, start=31),
    Case("wrapping", heads=3, head_dim=32, frames=3, frame_tokens=9, cache_tokens=55, start=50),
    Case("head of 128", heads=5, head_dim=128, frames=1, frame_tokens=13, cache_tokens=26, start=13),
    Case("normalised", heads=3, head_dim=64, frames=2, frame_tokens=7, cache_tokens=21, start=11, normalised=True),
    Case("one token", heads=1, head_dim=128, frames=1, frame_tokens=1, cache_tokens=1, start=0),
    Case("e4m3, a tile", heads=3, head_dim=64, frames=2, frame_tokens=64, cache_tokens=384, start=128, quantized=True),
    Case("e4m3, awkward", heads=2, head_dim=32, frames=3, frame_tokens=47, cache_tokens=512, start=256, quantized=True),
    Case(
        "e4m3, off a tile",
        heads=2,
        head_dim=128,
        frames=1,
        frame_tokens=63,
        cache_tokens=256,
        start=100,
        quantized=True,
    ),
    Case(
        "e4m3, normalised",
        heads=5,
        head_dim=32,
        frames=3,
        frame_tokens=45,
        cache_tokens=512,
        start=256,
        quantized=True,
        normalised=True,
    ),
)
