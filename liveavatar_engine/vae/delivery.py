"""Frames on their way from the decoder to who asked for them, while the device goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..runtime.timing import StageTimer


class Pending(Protocol):
    """Frames that have been asked for."""

    def wait(self) -> np.ndarray | Tensor:
        """The frames, uint8 [frames, height, width, 3], once they are there; to be called once."""
        ...


class Delivery(Protocol):
    """Takes frames out of a buffer of the device that is used again."""

    def take(self, frames: Tensor) -> Pending:
        """Take frames that the current stream has made."""
        ...


class FrameDecoder(Protocol):
    """A stream's decoder, as a session uses it."""

    def skip(self, latents: Tensor) -> None:
        """Decode latents for the sake of those that follow."""
        ...

    def check(self) -> None:
        """Raise a ModelError where what has been decoded so far is not finite, if that can be told; may wait."""
        ...

    def start(self, latents: Tensor, timer: StageTimer) -> Pending:
        """Start to decode the next latents, [latent_channels, count, height / 8, width / 8]; `timer` measures it."""
        ...

    def close(self) -> None:
        """Let go of what the stream needed."""
        ...


class HostFrames:
    """Brings frames to the host, from a GPU through page-locked buffers that take turns.

    They are copied on a stream of their own, so neither the decoder nor the host waits for a whole block.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: deque[Tensor] = deque()

    def take(self, frames: Tensor) -> Pending:
        """Start to copy frames that the current stream has made; it waits for the copy before it goes on."""
        if self._stream is None:
            return _Here(frames.clone())
        buffer = self._buffer(frames)
        decoding = torch.cuda.current_stream(frames.device)
        self._stream.wait_stream(decoding)
        with torch.cuda.stream(self._stream):
            buffer.copy_(frames, non_blocking=True)
        arrived = self._stream.record_event()
        decoding.wait_event(arrived)
        return _Arriving(buffer, arrived, self._free)

    def _buffer(self, frames: Tensor) -> Tensor:
        for _ in range(len(self._free)):
            buffer = self._free.popleft()
            if buffer.shape == frames.shape:
                return buffer
            self._free.append(buffer)
        return torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)


class Parts:
    """Frames that arrive in several parts."""

    def __init__(self, parts: Sequence[Pending]) -> None:
        self._parts = parts

    def wait(self) -> np.ndarray | Tensor:
        parts = [part.wait() for part in self._parts]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return torch.cat(tensors) if tensors else np.concatenate(parts)


class _Here:
    """Frames of a CPU."""

    def __init__(self, frames: Tensor) -> None:
        self._frames = frames

    def wait(self) -> np.ndarray:
        return self._frames.numpy()


class _Arriving:
    """Frames on their way into a page-locked buffer, which is free again once they have been waited for."""

    def __init__(self, buffer: Tensor, arrived: torch.cuda.Event, free: deque[Tensor]) -> None:
        self._buffer, self._arrived, self._free = buffer, arrived, free

    def wait(self) -> np.ndarray:
        self._arrived.synchronize()
        frames = self._buffer.numpy().copy()
        self._free.append(self._buffer)
        return frames


class DeviceFrames:
    """Leaves frames on the device, for callers who go on with them there."""

    def take(self, frames: Tensor) -> Pending:
        kept = frames.clone()
        made = torch.cuda.current_stream(frames.device).record_event() if frames.is_cuda else None
        return _There(kept, made)


class _There:
    """Frames on the device; the stream that is current when they are waited for comes after them."""

    def __init__(self, frames: Tensor, made: torch.cuda.Event | None) -> None:
        self._frames, self._made = frames, made

    def wait(self) -> Tensor:
        if self._made is not None:
            stream = torch.cuda.current_stream(self._frames.device)
            stream.wait_event(self._made)
            self._frames.record_stream(stream)
        return self._frames
