"""Channels over gloo, and over a copy in place of NCCL; `tests/gpu/test_gpu_channel.py` is the twin for GPUs."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from channels import SHAPE, Flow, Loopback, random_pauses
from pipelines import Beats, pipeline, session
from support import CPU
from torch import Tensor

from liveavatar_engine.pipeline.tpp import neighbours
from liveavatar_engine.pipeline.tpp.channel import BUFFERS, Credits, LatentReceiver, LatentSender, Shipment
from liveavatar_engine.pipeline.tpp.link import LOCALHOST, Link
from liveavatar_engine.pipeline.tpp.records import Record
from liveavatar_engine.pipeline.tpp.transport import open_backend, open_store

MESSAGES = 10_000


def _gloo() -> list[Any]:
    """Two backends that are connected."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda rank: open_backend(CPU, store, "two", rank, 2, LOCALHOST), range(2)))


@pytest.fixture(params=[pytest.param("gloo", marks=pytest.mark.slow), "loopback"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[LatentSender, LatentReceiver]]:
    backends = _gloo() if request.param == "gloo" else [Loopback(CPU)] * 2
    sender = LatentSender(SHAPE, torch.float32, CPU, backends[0], 1)
    receiver = LatentReceiver(SHAPE, torch.float32, CPU, backends[1], 0)
    for buffers in (sender, receiver):
        for shipment in buffers._shipments:
            shipment.latents.fill_(torch.nan)
    with ThreadPoolExecutor(1) as threads:
        greeted = threads.submit(receiver.greet)
        sender.greet()
        greeted.result()
    yield sender, receiver
    for backend in backends:
        backend.shutdown()


def test_no_message_is_lost_changed_or_overtaken(ends: tuple[LatentSender, LatentReceiver]) -> None:
    """Whatever is not a message's own is NaN: what it came from, and the buffers that it has left."""
    flow = Flow(*ends, pause=random_pauses(0, 5e-4))

    def use(number: int, shipment: Shipment) -> None:
        assert shipment.wait().eq(number).all(), f"message {number}"

    flow.run(lambda number: torch.full(SHAPE, float(number)), use, MESSAGES)
    assert flow.under_way == BUFFERS, "as many as there are buffers, and no more"


def test_the_store_where_backends_meet_cannot_be_reached_from_elsewhere() -> None:
    store = open_store(LOCALHOST)
    tables = "".join(Path("/proc/net", name).read_text(encoding="ascii") for name in ("tcp", "tcp6"))
    sockets, port = [line.split() for line in tables.splitlines()], f":{store.port:04X}"
    assert [local for _, local, _, state, *_ in sockets if local.endswith(port) and state == "0A"] == [
        "0100007F" + port
    ]
    other = dist.TCPStore(LOCALHOST, store.port, None, is_master=False)
    other.set("key", "value")
    assert store.get("key") == b"value"


def _blocks(thread: threading.Thread) -> bool:
    thread.start()
    thread.join(0.1)
    return thread.is_alive()


def test_a_sender_waits_for_a_free_buffer() -> None:
    class Endless:
        def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
            return self

        def wait(self) -> bool:
            return True

    sender = LatentSender(SHAPE, torch.float32, CPU, Endless(), 1)
    loaded = [sender.load(torch.full(SHAPE, float(number))) for number in range(BUFFERS)]
    assert [int(shipment.latents.unique()) for shipment in loaded] == [0, 1]
    waiting = threading.Thread(target=lambda: loaded.append(sender.load(torch.full(SHAPE, 2.0))))
    assert _blocks(waiting)
    sender.send(loaded[0])
    waiting.join(2)
    assert loaded[2].latents is loaded[0].latents
    assert loaded[2].latents.eq(2).all()
    assert loaded[1].latents.eq(1).all()


def test_no_more_credits_than_buffers() -> None:
    credits = Credits()
    for _ in range(BUFFERS):
        credits.take()
    waiting = threading.Thread(target=credits.take)
    assert _blocks(waiting)
    credits.give()
    waiting.join(2)
    assert not waiting.is_alive()


def test_a_receive_is_posted_only_behind_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """A posted NCCL receive keeps a GPU busy: none waits for a header, not even while a live stream is silent."""
    seen: dict[int, list[tuple[str, int]]] = defaultdict(list)
    posted: list[str] = []
    receive_record, receive_latents, open_one = Link.receive, LatentReceiver.receive, open_backend

    def see_header(link: Link) -> Record:
        record = receive_record(link)
        if record.kind == "block" and threading.current_thread().name == "liveavatar-upstream":
            seen[threading.get_ident()].append(("header", record["block"]))
        return record

    def see_receive(receiver: LatentReceiver) -> Shipment:
        events = seen[threading.get_ident()]
        events.append(("receive", sum(kind == "receive" for kind, _ in events)))
        return receive_latents(receiver)

    class Seeing:
        def __init__(self, backend: Any) -> None:
            self._backend, self.send, self.shutdown = backend, backend.send, backend.shutdown

        def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
            posted.append(threading.current_thread().name)
            return self._backend.recv(tensors, peer, tag)

    monkeypatch.setattr(Link, "receive", see_header)
    monkeypatch.setattr(LatentReceiver, "receive", see_receive)
    monkeypatch.setattr(neighbours, "open_backend", lambda *given, **named: Seeing(open_one(*given, **named)))
    with pipeline(4) as runner:
        features = Beats(None, held=3)
        stream = session(runner, features, max_blocks=8)
        assert [next(stream).index for _ in range(3)] == [0, 1, 2]
        time.sleep(0.2)
        in_order = [(kind, block) for block in range(3) for kind in ("header", "receive")]
        assert list(seen.values()) == [in_order] * 3, "nothing is posted while nothing comes"
        features.hold(8)
        assert len(list(stream)) == 5
    in_order = [(kind, block) for block in range(8) for kind in ("header", "receive")]
    assert list(seen.values()) == [in_order] * 3
    greetings = [name for name in posted if name != "liveavatar-upstream"]
    assert (len(greetings), len(posted)) == (3, 3 + 3 * 8)
