"""Static key-value buffers: a ring per timestep, and one sink that all timesteps share.

The arena is allocated once for all sessions that can be open at a time; a session is a slot in it. Memory starts
uninitialised: attention reads only what has been written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from liveavatar_kernels.cache import KeyValueCache
from liveavatar_kernels.e4m3 import E4M3, KV_TILE, padded_to_tile
from torch import Tensor

from ..config import StreamGeometry


@dataclass(frozen=True)
class CacheLayout:
    """Where tokens lie in a slot.

    In e4m3 no tile of keys belongs to two blocks, nor to both parts of the sink: every block starts on a tile, and the
    sink's fixed part ends on one.

    Attributes:
        block_stride: from the start of a block's tokens in the ring to that of the next.
        ring_tokens, sink_tokens: capacities.
        sink_start: first token of the sink.
    """

    block_stride: int
    ring_tokens: int
    sink_start: int
    sink_tokens: int

    @classmethod
    def of(cls, geometry: StreamGeometry, quantized: bool) -> CacheLayout:
        block, fixed, sink = geometry.tokens_per_block, geometry.fixed_sink_tokens, geometry.sink_tokens
        if not quantized:
            return cls(block, geometry.ring_tokens, 0, sink)
        stride, start = padded_to_tile(block), padded_to_tile(fixed) - fixed
        return cls(stride, stride * geometry.ring_tokens // block, start, padded_to_tile(start + sink))


@dataclass(frozen=True)
class StreamCaches:
    """The buffers of one session: slot `slot` of `rings[step][layer]` and `sink[layer]`."""

    rings: list[list[KeyValueCache]]
    sink: list[KeyValueCache]
    layout: CacheLayout
    slot: int


class CacheArena:
    """Rings and sinks of `slots` sessions, in the dtype of the network or in e4m3 with scales."""

    def __init__(
        self,
        geometry: StreamGeometry,
        steps: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        model = geometry.model
        self.layout = CacheLayout.of(geometry, dtype == E4M3)
        self.slots = slots
        heads = (model.num_heads, model.head_dim)
        ring, sink = self.layout.ring_tokens, self.layout.sink_tokens
        self._ring = _Buffers((slots, steps, model.num_layers), ring, heads, dtype, device, geometry.tokens_per_block)
        self._sink = _Buffers((slots, model.num_layers), sink, heads, dtype, device, run_tokens=0)
        self._rings = [[self._ring.cache(step, layer) for layer in range(model.num_layers)] for step in range(steps)]
        self._sinks = [self._sink.cache(layer) for layer in range(model.num_layers)]

    @property
    def ring_bytes(self) -> int:
        """Device memory of the rings."""
        return self._ring.bytes

    @property
    def sink_bytes(self) -> int:
        """Device memory of the sinks."""
        return self._sink.bytes

    def caches(self, slot: int) -> StreamCaches:
        """The buffers of a session."""
        return StreamCaches(self._rings, self._sinks, self.layout, slot)


class _Buffers:
    """One tensor each for all keys and all values, and in e4m3 for their scales; slots first."""

    def __init__(
        self,
        leading: tuple[int, ...],
        tokens: int,
        heads: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        run_tokens: int,
    ) -> None:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty((*leading, *shape), dtype=dtype, device=device)

        count, head_dim = heads
        self._run_tokens = run_tokens
        self._k = empty(tokens, count, head_dim)
        self._k_scale: Tensor | None = None
        self._v_scale: Tensor | None = None
        if dtype == E4M3:
            self._v = empty(count, head_dim, tokens)
            self._k_scale = empty(count, tokens, dtype=torch.float32)
            self._v_scale = empty(count, tokens // KV_TILE, dtype=torch.float32)
        else:
            self._v = empty(tokens, count, head_dim)

    @property
    def bytes(self) -> int:
        tensors = (self._k, self._v, self._k_scale, self._v_scale)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def cache(self, *index: int) -> KeyValueCache:
        """The cache at an index into the leading axes behind the slots."""

        def part(tensor: Tensor) -> Tensor:
            for i in index:
                tensor = tensor.select(1, i)
            return tensor

        if self._k_scale is None or self._v_scale is None:
            return KeyValueCache(part(self._k), part(self._v), run_tokens=self._run_tokens)
        scales = part(self._k_scale), part(self._v_scale)
        return KeyValueCache(part(self._k), part(self._v), *scales, self._run_tokens)
