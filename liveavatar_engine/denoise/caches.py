"""Static key-value buffers: a ring per timestep, and one sink that all timesteps share.

The arena is allocated once for all sessions that can be open at a time; a session is a slot in it. Memory starts
uninitialised: attention reads only what has been written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import StreamGeometry
from ..model.attention import KeyValue


@dataclass(frozen=True)
class StreamCaches:
    """The buffers of one session: `rings[step][layer]` and `sink[layer]`, each [tokens, heads, head_dim]."""

    rings: list[list[KeyValue]]
    sink: list[KeyValue]


class CacheArena:
    """Rings and sinks of `slots` sessions in four tensors."""

    def __init__(
        self, geometry: StreamGeometry, steps: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        model = geometry.model
        head = (model.num_heads, model.head_dim)
        self.ring_shape = (slots, steps, model.num_layers, geometry.ring_tokens, *head)
        self.sink_shape = (slots, model.num_layers, geometry.sink_tokens, *head)
        self._ring_k, self._ring_v = (torch.empty(self.ring_shape, dtype=dtype, device=device) for _ in range(2))
        self._sink_k, self._sink_v = (torch.empty(self.sink_shape, dtype=dtype, device=device) for _ in range(2))

    @property
    def bytes(self) -> int:
        """Device memory of the arena."""
        return sum(t.numel() * t.element_size() for t in (self._ring_k, self._ring_v, self._sink_k, self._sink_v))

    def caches(self, slot: int) -> StreamCaches:
        """Views of a session's buffers."""
        return StreamCaches(
            rings=[_layers(k, v) for k, v in zip(self._ring_k[slot], self._ring_v[slot], strict=True)],
            sink=_layers(self._sink_k[slot], self._sink_v[slot]),
        )


def _layers(k: Tensor, v: Tensor) -> list[KeyValue]:
    return [KeyValue(*layer) for layer in zip(k, v, strict=True)]
