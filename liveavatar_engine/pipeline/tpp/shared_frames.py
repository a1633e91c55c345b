"""Frames from one process to another on the same machine: slots in shared memory that take turns."""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np

from ...errors import OutputError

_SHARED_MEMORY = Path("/dev/shm")


class SharedFrames:
    """Slots of equal size, each for the frames of one delivery.

    Args:
        path: of the file behind them.
        slots: their number.
        slot_bytes: of each.
    """

    def __init__(self, path: Path, slots: int, slot_bytes: int) -> None:
        self.path, self.slots, self.slot_bytes = path, slots, slot_bytes
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), slots * slot_bytes)
        self._bytes = np.frombuffer(self._memory, np.uint8).reshape(slots, slot_bytes)

    @classmethod
    def create(cls, slots: int, slot_bytes: int) -> Self:
        """New slots. `forget` their name when the other process has opened them, so that nothing outlives both.

        They lie in a temporary file where shared memory is too small, as it often is in containers.

        Raises:
            OutputError: there is no room for them.
        """
        folders = (_SHARED_MEMORY, Path(tempfile.gettempdir()))
        for folder in folders:
            with suppress(OSError):
                return cls._create_in(folder, slots, slot_bytes)
        raise OutputError(f"frames of workers: no {slots * slot_bytes} bytes free in {' or '.join(map(str, folders))}")

    @classmethod
    def _create_in(cls, folder: Path, slots: int, slot_bytes: int) -> Self:
        with tempfile.NamedTemporaryFile(prefix="liveavatar-", dir=folder, delete=False) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, slots * slot_bytes)
                return cls(Path(file.name), slots, slot_bytes)
            except OSError:
                Path(file.name).unlink()
                raise

    def forget(self) -> None:
        """Remove the name; the memory lives as long as somebody has it open."""
        self.path.unlink(missing_ok=True)

    def write(self, slot: int, frames: np.ndarray) -> None:
        """Put uint8 frames of any shape into a slot."""
        self._bytes[slot, : frames.nbytes].reshape(frames.shape)[...] = frames

    def read(self, slot: int, shape: tuple[int, ...]) -> np.ndarray:
        """A copy of the frames in a slot."""
        count = int(np.prod(shape))
        return self._bytes[slot, :count].reshape(shape).copy()
