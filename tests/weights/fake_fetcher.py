"""A stand-in for a device: copies that are counted as long as they live."""

import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class FakeFetcher:
    """Brings clones instead of copies on a device.

    Attributes:
        kept: bytes in host memory.
        live, peak: bytes of clones that are alive, and most at a time.
        fetched: bytes of all clones.
    """

    def __init__(self) -> None:
        self.kept = self.live = self.peak = self.fetched = 0
        self._home: set[int] = set()
        self._lock = threading.Lock()

    def keep(self, tensor: Tensor) -> Tensor:
        kept = tensor.clone()
        with self._lock:
            self.kept += kept.nbytes
            self._home.add(kept.data_ptr())
        return kept

    def fetch(self, kept: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        assert all(tensor.data_ptr() in self._home for tensor in kept), "something that was not kept is fetched"
        copies = [tensor.clone() for tensor in kept]
        for copy in copies:
            self._count(copy.untyped_storage())
        return lambda: copies

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.live += size
        self.fetched += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size
