"""How many operations some work enqueues, and how many bytes it only moves: both are the same on every device."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FREE = ("aten::empty", "aten::new_empty", "aten::detach")
_COPIES = ("aten::copy_", "aten::clone", "aten::cat", "aten::stack", "aten::_to_copy", "aten::constant_pad_nd")
"""Operations that compute nothing."""


class Counter(TorchDispatchMode):
    """Counts the operations of the `with` body; views are none, and a fused op is one.

    Attributes:
        operations: enqueued on the device.
        copied_bytes: written by those that only move or convert.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.copied_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if not name.startswith(_FREE) and (function._schema.is_mutable or not _is_view(result, (args, kwargs))):
            self.operations += 1
            if name in _COPIES:
                self.copied_bytes += sum(each.nbytes for each in tree_leaves(result) if isinstance(each, Tensor))
        return result


def _is_view(result: Any, given: Any) -> bool:
    """Whether all tensors of a result lie in memory that was there."""
    there = {_storage(each) for each in tree_leaves(given) if isinstance(each, Tensor)}
    made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
    return bool(made) and all(_storage(each) in there for each in made)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
