"""What ranks tell each other: two to four of them in threads of one process, over Gloo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from liveavatar_engine.runtime.group import BackendGroup


@contextmanager
def _backends(size: int) -> Iterator[list[Any]]:
    store = dist.HashStore()

    def connect(rank: int) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=20)
        return dist.ProcessGroupGloo(store, rank, size, options)

    with ThreadPoolExecutor(size) as threads:
        backends = list(threads.map(connect, range(size)))
        try:
            yield backends
        finally:
            for backend in backends:
                backend.shutdown()


def _together(backends: list[Any], say: Callable[[BackendGroup], Tensor]) -> list[Tensor]:
    """What each rank gets, in order."""
    with ThreadPoolExecutor(len(backends)) as threads:
        return list(threads.map(say, map(BackendGroup, backends)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_rows_go_where_they_belong(dtype: torch.dtype) -> None:
    """Rank r sends r + 1 rows to each; a row says from where to where it goes."""

    def say(group: BackendGroup) -> Tensor:
        rows = torch.tensor([[[group.rank, to]] * 2 for to in range(3) for _ in range(group.rank + 1)]).to(dtype)
        return group.all_to_all(rows, [group.rank + 1] * 3, [1, 2, 3])

    with _backends(3) as backends:
        for rank, received in enumerate(_together(backends, say)):
            assert received.dtype == dtype
            expected = [[[of, rank]] * 2 for of in range(3) for _ in range(of + 1)]
            assert received.float().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_rows_are_gathered_in_the_order_of_ranks(dtype: torch.dtype) -> None:
    def say(group: BackendGroup) -> Tensor:
        return group.gather(torch.arange(12).view(3, 4).t().add(100 * group.rank).to(dtype))

    with _backends(2) as backends:
        rows = torch.arange(12).view(3, 4).t()
        expected = torch.cat((rows, rows + 100)).to(dtype)
        assert all(gathered.equal(expected) for gathered in _together(backends, say))


def test_a_peer_that_is_gone_is_an_error() -> None:
    rows = torch.zeros(2, 1)
    with _backends(2) as backends:
        _together(backends, lambda group: group.gather(rows))
        backends.pop().abort()
        with pytest.raises(RuntimeError):
            BackendGroup(backends[0]).gather(rows)
