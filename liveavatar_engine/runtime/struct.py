"""Small tensors that change from block to block, in one buffer on the device and filled by one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_ALIGNMENT = 64
_STAGES = 4
"""Blocks that can be on their way to a GPU before the host waits for one."""


class DeviceStruct:
    """Named tensors over one buffer.

    On a GPU, `host` is a pinned buffer, and `send` starts its copy without waiting; there is a ring of such buffers,
    and one is written again only when its last copy has arrived. On a CPU the two are the same memory.
    """

    def __init__(self, fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        self._fields = dict(fields)
        size = sum(_size(*field) for field in fields.values())
        buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        self._device = self._views(buffer)
        self._buffer = buffer
        self._pinned = device.type == "cuda"
        stages = [buffer]
        if self._pinned:
            stages = [torch.zeros(size, dtype=torch.uint8).pin_memory() for _ in range(_STAGES)]
        self._stages = [(stage, self._views(stage)) for stage in stages]
        self._arrived = [torch.cuda.Event() for _ in stages] if self._pinned else []
        self._stage = 0

    def __getitem__(self, name: str) -> Tensor:
        """The tensor on the device."""
        return self._device[name]

    def host(self) -> dict[str, Tensor]:
        """The tensors to write before `send`: all of them, as what they held is another block's."""
        if self._pinned:
            self._arrived[self._stage].synchronize()
        return self._stages[self._stage][1]

    def send(self) -> None:
        """Copy what was written to the device, in the current stream."""
        if self._pinned:
            self._buffer.copy_(self._stages[self._stage][0], non_blocking=True)
            self._arrived[self._stage].record()
            self._stage = (self._stage + 1) % _STAGES

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        views, start = {}, 0
        for name, (shape, dtype) in self._fields.items():
            stop = start + math.prod(shape) * dtype.itemsize
            views[name] = buffer[start:stop].view(dtype).view(shape)
            start += _size(shape, dtype)
        return views


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a field, up to where the next may start."""
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
