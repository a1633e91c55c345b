"""A stand-in for CUDA graphs on a CPU: records the operations of some work, and repeats these without its code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HOST = ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::item", "aten::is_nonzero")
"""Operations that read a value on the host or bring one from there: a graph cannot hold them."""


class Tape(TorchDispatchMode):
    """Operations with the very tensors that they read and wrote; fused ops are one operation each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name not in _HOST, f"{function} in recorded work"
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do it again: what was new memory then is overwritten where it lies."""
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes:
    """Records work on tapes, as `CudaGraphs` does in graphs."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        with Tape() as tape, torch.inference_mode():
            work()

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay

    def stream(self, *, callers_wait: bool = True) -> AbstractContextManager[None]:
        return nullcontext()

    def hand_out(self, tensor: Tensor) -> Tensor:
        return tensor

    def take_in(self, tensor: Tensor) -> Tensor:
        return tensor
