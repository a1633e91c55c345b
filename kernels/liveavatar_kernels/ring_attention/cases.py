"""Shapes of ring_attention, declared once for tests, benchmarks and warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import FIXED, MOVED, RING, RING_WRAPPED, KeyValueCache, Window
from ..e4m3 import KV_TILE, padded_to_tile, quantize_rows, scale_of, to_e4m3
from ..model_sizes import ModelSizes

Segments = dict[int, tuple[int, int]]
_OUTLIER = 100.0


@dataclass(frozen=True)
class Case:
    """A block's queries and what they see, in slot 1 of 2 of the ring and slot 0 of 2 of the sink.

    Attributes:
        tokens: of the block.
        ring_tokens, sink_tokens: capacities.
        segments: first token and length by row of the segment table; one such per group of heads.
        shift: latent frames by which the moved keys have rolled on.
        run_tokens: of an e4m3 ring; 0: the ring is one run.
        outliers: make some values 100 times larger, whole tokens and whole channels.
    """

    name: str
    heads: int
    head_dim: int
    tokens: int
    ring_tokens: int
    sink_tokens: int
    segments: tuple[Segments, ...]
    shift: int = 0
    quantized: bool = False
    run_tokens: int = 0
    outliers: bool = False

    @property
    def keys(self) -> int:
        """Tokens attended to, on average over the heads."""
        return sum(length for group in self.segments for _, length in group.values()) // len(self.segments)

    @property
    def flops(self) -> int:
        return 4 * self.tokens * self.keys * self.heads * self.head_dim

    @property
    def bytes(self) -> int:
        """Least traffic: q and the result at two bytes an element, keys and values at two or one."""
        stored = 1 if self.quantized else 2
        return self.heads * self.head_dim * (2 * 2 * self.tokens + 2 * stored * self.keys)

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of the op: random where the window looks, NaN elsewhere."""
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(self.tokens, self.heads, self.head_dim, generator=generator)
        time_pairs = self.head_dim // 2 - 2 * (self.head_dim // 6)
        angles = self.shift * 10_000.0 ** -(torch.arange(time_pairs, dtype=torch.float64) / time_pairs)
        table = torch.zeros(len(self.segments), MOVED + 1, 2, dtype=torch.int32)
        for group, segments in enumerate(self.segments):
            for row, (start, length) in segments.items():
                table[group, row] = torch.tensor([start, length])
        ring, sink = (
            self._cache(tokens, slot, rows, dtype, device, generator)
            for tokens, slot, rows in (
                (self.ring_tokens, 1, (RING, RING_WRAPPED)),
                (self.sink_tokens, 0, (FIXED, MOVED)),
            )
        )
        return {
            "q": q.to(device, dtype),
            "ring": ring,
            "sink": sink,
            "window": Window(
                torch.tensor([1, 0], dtype=torch.int32, device=device),
                table.to(device),
                torch.stack((angles.cos(), angles.sin())).float().to(device),
            ),
        }

    def _cache(
        self, tokens: int, slot: int, rows: tuple[int, int], dtype: torch.dtype, device: str, generator: torch.Generator
    ) -> KeyValueCache:
        k, v = torch.randn(2, 2, tokens, self.heads, self.head_dim, generator=generator)
        if self.outliers:
            v[:, ::17] *= _OUTLIER
            v[..., ::13] *= _OUTLIER
        seen = torch.zeros(2, tokens, dtype=torch.bool)
        for group in self.segments:
            for start, length in (group[row] for row in rows if row in group):
                seen[slot, start : start + length] = True
        run_tokens = self.run_tokens if rows[0] == RING else 0
        if run_tokens:
            seen &= torch.arange(tokens) % padded_to_tile(run_tokens) < run_tokens
        if not self.quantized:
            k, v = (x.masked_fill(~seen[..., None, None], float("nan")).to(device, dtype) for x in (k, v))
            return KeyValueCache(k, v)
        return _quantized(k.to(device), v.to(device), seen.to(device), run_tokens)


def _quantized(k: Tensor, v: Tensor, seen: Tensor, run_tokens: int) -> KeyValueCache:
    """[slots, tokens, heads, head_dim] as ring_write stores it: tiles in use end in zeros, others hold NaN."""
    written = seen.unflatten(1, (-1, KV_TILE)).any(-1)
    unwritten = ~written.repeat_interleave(KV_TILE, dim=1)
    k, v = (x.masked_fill(~seen[..., None, None], 0.0) for x in (k, v))
    keys, k_scale = quantize_rows(k)
    tiles = v.unflatten(1, (-1, KV_TILE))
    v_scale = scale_of(tiles.abs().amax(dim=(2, 4)))
    values = to_e4m3(tiles, v_scale[:, :, None, :, None]).flatten(1, 2)
    nan = float("nan")
    keys, values = (
        x.float().masked_fill(unwritten[..., None, None], nan).to(torch.float8_e4m3fn) for x in (keys, values)
    )
    return KeyValueCache(
        keys,
        values.permute(0, 2, 3, 1).contiguous(),
        k_scale.masked_fill(unwritten[..., None], nan).transpose(1, 2).contiguous(),
        v_scale.masked_fill(~written[..., None], nan).transpose(1, 2).contiguous(),
        run_tokens,
    )


def model_cases(sizes: ModelSizes) -> tuple[Case, ...]:
    """A full ring and the whole sink at every picture size."""
    cases = []
    for tokens, sink_tokens in zip(sizes.block_tokens, sizes.sink_tokens, strict=True):
        moved = tokens // sizes.block_frames
        fixed = sink_tokens - moved
        for quantized in (False, True):
            run = padded_to_tile(tokens) if quantized else tokens
            lead = padded_to_tile(fixed) - fixed if quantized else 0
            sink = padded_to_tile(lead + sink_tokens) if quantized else sink_tokens
            cases.append(
                Case(
                    f"{tokens} tokens{', e4m3' if quantized else ''}",
                    sizes.heads,
                    sizes.head_dim,
                    tokens,
                    sizes.ring_blocks * run,
                    sink,
                    ({RING: (0, sizes.ring_blocks * run), FIXED: (lead, fixed), MOVED: (lead + fixed, moved)},),
                    shift=100,
                    quantized=quantized,
                    run_tokens=tokens if quantized else 0,
                )
            )
    return tuple(cases)


CASES = (
    Case("square", 2, 32, 48, 192, 56, ({RING: (0, 192), FIXED: (0, 40), MOVED: (40, 16)},)),
    Case("awkward lengths", 3, 64, 63, 1000, 48, ({RING: (0, 1000), FIXED: (0, 37), MOVED: (37, 11)},), shift=137),
    Case("one query", 1, 128, 1, 7, 5, ({RING: (0, 7), MOVED: (0, 5)},), shift=30),
    Case("no sink", 2, 32, 20, 40, 8, ({RING: (0, 20)},)),
    Case("no ring", 2, 64, 37, 40, 50, ({FIXED: (3, 40)},)),
    Case("partly filled", 2, 32, 20, 80, 9, ({RING: (0, 20), MOVED: (0, 9)},), shift=1_000_000),
    Case("window that wraps", 2, 64, 33, 129, 55, ({RING: (96, 33), RING_WRAPPED: (0, 33), MOVED: (24, 31)},), shift=4),
    Case("head of 128", 2, 128, 33, 129, 55, ({RING: (0, 129), FIXED: (0, 24), MOVED: (24, 31)},), shift=4),
    Case(
        "groups of heads",
        4,
        32,
        50,
        100,
        30,
        ({RING: (0, 100), FIXED: (0, 20), MOVED: (20, 10)}, {RING: (50, 50), MOVED: (20, 10)}),
        shift=9,
    ),
    Case("e4m3", 2, 64, 63, 512, 128, ({RING: (0, 512), FIXED: (28, 60), MOVED: (88, 40)},), 7, True, 200),
    Case("e4m3, partly filled", 3, 32, 20, 512, 128, ({RING: (0, 128), MOVED: (0, 40)},), 30, True, 99),
    Case(
        "e4m3, a window inside, values with outliers",
        2,
        128,
        17,
        512,
        256,
        ({RING: (384, 128), RING_WRAPPED: (0, 128), FIXED: (100, 28), MOVED: (128, 90)},),
        500,
        True,
        120,
        True,
    ),
)
