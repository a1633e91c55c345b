"""Memory that tensors take while something runs, counted rather than measured."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Most bytes alive at once of what was made in the `with` body; works without any memory, on the meta device.

    Args:
        device: a kind of device whose tensors alone are counted; None: all.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self._device = device
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if not isinstance(tensor, torch.Tensor) or self._device not in (None, tensor.device.type):
                continue
            if _storage(tensor) not in inputs | self._known:
                self._allocate(tensor.untyped_storage())
        return outputs

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        self._known.add(storage._cdata)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.live -= count


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
