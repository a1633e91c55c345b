"""Devices that compute one timestep together, and what they tell each other: rows of tensors of any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """Ranks that share a timestep. Each makes the same calls in the same order, with tensors of one device kind.

    So all of them must be given the same work in the same order: sessions, blocks, prompts that change, and what is
    recorded. A rank that waits for another one waits in these calls.
    """

    @property
    def rank(self) -> int:
        """0 to size - 1."""
        ...

    @property
    def size(self) -> int: ...

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Give every rank some of the rows, and get some from each.

        Args:
            rows: [sum(sent), ...], in the order of the ranks that they go to.
            sent: rows that go to each rank.
            received: rows that come from each rank.

        Returns:
            [sum(received), ...], in the order of the ranks that they come from.
        """
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """All ranks' rows, as many from each, in the order of the ranks: [count, ...] -> [size * count, ...]."""
        ...

    def share(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, which others overwrite theirs with: of the same shape and dtype, contiguous."""
        ...


class Work(Protocol):
    """A call of a backend that is under way."""

    def wait(self) -> object:
        """Let the current stream wait for it; without streams, the caller."""
        ...


class Backend(Protocol):
    """The part of torch.distributed's `Backend` that is used: `ProcessGroupGloo` and `ProcessGroupNCCL` have it."""

    def rank(self) -> int: ...

    def size(self) -> int: ...

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_split_sizes: list[int], input_split_sizes: list[int], opts: Any, /
    ) -> Work | None: ...

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any, /) -> Work | None: ...

    def broadcast(self, tensors: list[Tensor], opts: Any, /) -> Work | None: ...


class BackendGroup:
    """A group over a raw backend of torch.distributed, Gloo's or NCCL's, which belongs to whoever has built it.

    Nothing is registered globally. On a GPU the calls are enqueued in the current stream and the host does not wait, so
    that they can be captured in a CUDA graph after one plain run, in which NCCL makes its connections. That is written
    after torch's documentation and has never run: it is tested with Gloo on CPUs, where the host waits.

    Raises:
        RuntimeError: in any call, from the backend: a peer is gone, or has not come before the backend's time-out.
    """

    def __init__(self, backend: Backend) -> None:
        from torch.distributed.distributed_c10d import (  # not in every build of torch
            AllgatherOptions,
            AllToAllOptions,
            BroadcastOptions,
        )

        self._backend = backend
        self._to_all, self._gather, self._share = AllToAllOptions(), AllgatherOptions(), BroadcastOptions()
        self._to_all.asyncOp = self._gather.asyncOp = self._share.asyncOp = False

    @property
    def rank(self) -> int:
        return self._backend.rank()

    @property
    def size(self) -> int:
        return self._backend.size()

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        made = rows.new_empty((sum(received), *rows.shape[1:]))
        into, of = _as_bytes(made), _as_bytes(rows)
        _done(self._backend.alltoall_base(into, of, list(received), list(sent), self._to_all))
        return made

    def gather(self, rows: Tensor) -> Tensor:
        made = rows.new_empty((self.size * len(rows), *rows.shape[1:]))
        _done(self._backend._allgather_base(_as_bytes(made), _as_bytes(rows), self._gather))
        return made

    def share(self, tensor: Tensor) -> Tensor:
        _done(self._backend.broadcast([tensor], self._share))
        return tensor


def _as_bytes(rows: Tensor) -> Tensor:
    """[rows, ...] -> [rows, bytes]: not every backend knows every dtype."""
    return rows.contiguous().flatten(1).view(torch.uint8)


def _done(work: Work | None) -> None:
    """Let what comes next in the current stream come after the call; without a GPU, wait for it."""
    if work is not None:
        work.wait()
