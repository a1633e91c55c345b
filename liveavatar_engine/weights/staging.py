"""Tensors from files to a device: threads read ahead into locked buffers, from which the device fetches at full speed.

Reading, the way to the device and what is done there overlap; no more is read ahead than the buffers hold.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError

_THREADS = 4
_PIECE = 1 << 25
"""Bytes read at a time."""
_BUFFERS = 8


@dataclass(frozen=True)
class Extent:
    """A tensor's place in a file."""

    name: str
    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def staged(
    extents: Iterable[Extent],
    device: torch.device,
    *,
    piece: int = _PIECE,
    buffers: int = _BUFFERS,
    threads: int = _THREADS,
) -> Generator[tuple[str, Tensor]]:
    """Name and tensor on `device` of every extent, in their order.

    Tensors are enqueued on the current stream of the device: what follows there finds them complete.

    Args:
        extents: what to read.
        device: where to.
        piece: bytes read at a time.
        buffers: pieces that are read ahead.
        threads: that read.

    Raises:
        CheckpointError: a file ends before its tensors do, or cannot be read.
    """
    pieces = zip(_pieces(extents, piece), cycle([_Buffer(piece, device) for _ in range(buffers)]), strict=False)
    reading: deque[tuple[_Piece, _Buffer, Future[Tensor]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="liveavatar-read")

    def read_on() -> None:
        if (following := next(pieces, None)) is not None:
            part, buffer = following
            reading.append((part, buffer, pool.submit(buffer.fill, part)))

    try:
        for _ in range(buffers):
            read_on()
        target = torch.empty(0)
        while reading:
            part, buffer, filled = reading.popleft()
            if part.first == 0:
                target = torch.empty(part.of.bytes, dtype=torch.uint8, device=device)
            target[part.first : part.last].copy_(filled.result(), non_blocking=True)
            buffer.emptied()
            read_on()
            if part.last == part.of.bytes:
                yield part.of.name, target.view(part.of.dtype).view(part.of.shape)
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Piece:
    """Bytes `first` to `last` of an extent."""

    of: Extent
    first: int
    last: int


def _pieces(extents: Iterable[Extent], size: int) -> Iterator[_Piece]:
    for extent in extents:
        for first in range(0, max(extent.bytes, 1), size):
            yield _Piece(extent, first, min(first + size, extent.bytes))


class _Buffer:
    """Host memory for a piece, page-locked where the device can fetch from it by itself."""

    def __init__(self, size: int, device: torch.device) -> None:
        locked = device.type == "cuda"
        self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=locked)
        self._fetched = torch.cuda.Event() if locked else None

    def fill(self, piece: _Piece) -> Tensor:
        """Read a piece once the device has fetched the last one; in a thread."""
        if self._fetched is not None:
            self._fetched.synchronize()
        filled = self._bytes[: piece.last - piece.first]
        _read_into(filled.numpy().data, piece)
        return filled

    def emptied(self) -> None:
        """Say that all fetches from the buffer have been enqueued."""
        if self._fetched is not None:
            self._fetched.record()


def _read_into(target: memoryview, piece: _Piece) -> None:
    path = piece.of.path
    try:
        with path.open("rb", buffering=0) as file:
            position, done = piece.of.start + piece.first, 0
            while done < len(target):
                count = os.preadv(file.fileno(), [target[done:]], position + done)
                if not count:
                    raise CheckpointError(f"{path}: truncated: it ends within tensor {piece.of.name}")
                done += count
    except OSError as error:
        raise CheckpointError(f"{path}: tensor {piece.of.name} cannot be read ({error.strerror})") from error
