"""Pipelines of sleeping stages, in threads or processes, and streams for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from liveavatar_engine.config import EngineConfig, ModelConfig, StreamGeometry
from liveavatar_engine.pipeline.runner import StreamOrder
from liveavatar_engine.pipeline.session import Session
from liveavatar_engine.pipeline.tpp.launch import Spawn
from liveavatar_engine.pipeline.tpp.link import LOCALHOST, Address, connect
from liveavatar_engine.pipeline.tpp.many_devices import ManyDevices
from liveavatar_engine.pipeline.tpp.plan import StageCosts
from liveavatar_engine.pipeline.tpp.rehearsal import rehearsal, rehearsal_order, rehearsal_session
from liveavatar_engine.pipeline.tpp.worker import Worker

MODEL = ModelConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=1, audio_dim=4, audio_inject_layers=(0,), text_len=4)
QUICK = StageCosts.of(1.0, 1.0)


class ThreadProcess:
    """A worker in a thread of this process; it cannot be killed, but its link can be cut."""

    def __init__(self, rank: int, address: Address, key: bytes) -> None:
        self.rank = rank
        self._status: int | None = None
        self._left = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(address, key), daemon=True)
        self.thread.start()

    def _serve(self, address: Address, key: bytes) -> None:
        Worker(connect(address, key), self.rank, key, LOCALHOST, leave=self._leave).serve()
        self._leave(self._status or 0)

    def _leave(self, status: int) -> None:
        self._status = status
        self._left.set()

    def poll(self) -> int | None:
        return self._status

    def wait(self, seconds: float) -> int | None:
        self._left.wait(seconds)
        return self._status

    def kill(self) -> None:
        pass


class Threads:
    """A launcher whose workers are threads: quick, and open to monkeypatching."""

    host = LOCALHOST

    def start(self, address: Address, key: bytes, ranks: int) -> list[Any]:
        return [ThreadProcess(rank, address, key) for rank in range(ranks)]


class Beats:
    """Audio of some blocks; the samples say nothing. `held` blocks are there, more when it is raised."""

    def __init__(self, blocks: int | None, held: int = 10**9) -> None:
        self.columns = None if blocks is None else 12 * blocks
        self._held, self._changed = held, threading.Condition()
        self.asked = 0

    def hold(self, blocks: int) -> None:
        with self._changed:
            self._held = blocks
            self._changed.notify_all()

    def block(self, index: int) -> Tensor | None:
        self.asked = max(self.asked, index + 1)
        with self._changed:
            self._changed.wait_for(lambda: index < self._held)
        return None if self.columns is not None and 12 * index >= self.columns else torch.zeros(1, 2, 4, 12)

    def ready(self, index: int) -> bool:
        return index < self._held


def order(features: Any, *, update_after: int | None = 4, side: int = 64, max_blocks: int | None = None) -> StreamOrder:
    return rehearsal_order(
        StreamGeometry(MODEL, side, side), features, update_after=update_after, max_blocks=max_blocks
    )


@contextmanager
def pipeline(
    devices: int, costs: StageCosts = QUICK, *, threads: bool = True, trace: bool = False, **settings: Any
) -> Iterator[ManyDevices]:
    """An open pipeline of sleeping stages."""
    config = EngineConfig(size="64x64", devices=tuple(f"cpu:{index}" for index in range(devices)), **settings)
    with rehearsal(config, costs, MODEL, launcher=Threads() if threads else Spawn(), trace=trace) as made:
        yield made


def free_slots(runner: ManyDevices) -> int:
    """Free slots, when streams that have been closed have left the pipeline."""
    runner._streams.idle()
    return runner.free_slots


def session(runner: ManyDevices, features: Any, **settings: Any) -> Session:
    return rehearsal_session(runner, order(features, **settings))
