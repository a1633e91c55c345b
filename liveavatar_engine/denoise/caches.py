"""Static key-value buffers: rings, sinks and prompts of all sessions that can be open at a time.

Allocated once; a session is a number. Memory starts uninitialised: attention reads only what has been written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from liveavatar_kernels.cache import KeyValueCache
from liveavatar_kernels.e4m3 import E4M3, KV_TILE, padded_to_tile
from torch import Tensor

from ..config import StreamGeometry
from ..model.attention import KeyValue, LayerCaches

SCENES = 2
"""Sinks and prompts per session: one is read while the next is made."""


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


class CacheArena:
    """Rings and sinks in `dtype`, that of the network or e4m3 with scales; prompts in the network's dtype.

    Where `ranks` share a timestep, rings and sinks have the heads of one of them; prompts have all heads.

    Session s has the ring slots s * rings .. s * rings + rings - 1, and two slots each of the sinks and prompts.

    Attributes:
        layout: of a slot.
        rings: per session, one per timestep unless they share a clean one.
        layers: what blocks read and write, one entry per layer.
        sink_layers: the same for the prefill of a sink, which takes the ring's place.
    """

    def __init__(
        self,
        geometry: StreamGeometry,
        rings: int,
        sessions: int,
        dtype: torch.dtype,
        text_dtype: torch.dtype,
        device: torch.device,
        ranks: int = 1,
    ) -> None:
        """Allocate it.

        Raises:
            ConfigError: `ranks` cannot share the geometry's tokens and the network's heads.
        """
        model = geometry.model
        mine = (geometry.heads_per_rank(ranks), model.head_dim)
        self.layout = CacheLayout.of(geometry, dtype == E4M3)
        self.rings, self.sessions = rings, sessions
        heads = (model.num_heads, model.head_dim)
        ring, sink, layers = self.layout.ring_tokens, self.layout.sink_tokens, model.num_layers
        self._ring = _Buffers((sessions * rings, layers), ring, mine, dtype, device, geometry.tokens_per_block)
        self._sink = _Buffers((sessions * SCENES, layers), sink, mine, dtype, device, run_tokens=0)
        self._text = _Buffers((sessions * SCENES, layers), model.text_len, heads, text_dtype, device, run_tokens=0)
        parts = [(self._ring.cache(i), self._sink.cache(i), self._text.cache(i)) for i in range(layers)]
        self.layers = [LayerCaches(ring, sink, KeyValue(text.k, text.v)) for ring, sink, text in parts]
        self.sink_layers = [LayerCaches(layer.sink, layer.sink, layer.text) for layer in self.layers]

    @property
    def ring_bytes(self) -> int:
        """Device memory of the rings."""
        return self._ring.bytes

    @property
    def sink_bytes(self) -> int:
        """Device memory of the sinks."""
        return self._sink.bytes

    @property
    def text_bytes(self) -> int:
        """Device memory of the prompts' keys and values."""
        return self._text.bytes

    def ring_slot(self, session: int, step: int) -> int:
        """The ring that `step` of a session writes and reads."""
        return session * self.rings + min(step, self.rings - 1)

    def scene_slots(self, session: int) -> range:
        """A session's slots of sinks and of prompts."""
        return range(session * SCENES, (session + 1) * SCENES)


class _Buffers:
    """One tensor each for all keys and all values, and in e4m3 for their scales; slots first, then layers."""

    def __init__(
        self,
        leading: tuple[int, int],
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

    def cache(self, layer: int) -> KeyValueCache:
        """One layer's part of every slot."""
        if self._k_scale is None or self._v_scale is None:
            return KeyValueCache(self._k[:, layer], self._v[:, layer], run_tokens=self._run_tokens)
        scales = self._k_scale[:, layer], self._v_scale[:, layer]
        return KeyValueCache(self._k[:, layer], self._v[:, layer], *scales, self._run_tokens)
