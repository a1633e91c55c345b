"""A channel's streams, events and buffers on one GPU, which sends to itself in a grouped NCCL operation.

These have never run: they were written without a GPU. `tests/tpp/test_channel.py` is their twin for CPUs. How a channel
does between two GPUs, and in which order NCCL meets a receive and its send there, a machine with one cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from channels import SHAPE, Flow, Loopback, random_pauses
from torch import Tensor

from liveavatar_engine.pipeline.tpp.channel import BUFFERS, LatentReceiver, LatentSender, Shipment

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU = torch.device("cuda:0")
MESSAGES = 10_000


@pytest.fixture
def ends() -> Iterator[tuple[LatentSender, LatentReceiver]]:
    backend = Loopback(GPU)
    sender = LatentSender(SHAPE, torch.float32, GPU, backend, 0)
    receiver = LatentReceiver(SHAPE, torch.float32, GPU, backend, 0)
    with ThreadPoolExecutor(1) as threads:
        greeted = threads.submit(receiver.greet)
        sender.greet()
        greeted.result()
    yield sender, receiver
    backend.shutdown()


def test_no_message_is_lost_changed_or_overtaken_and_nobody_waits_for_the_device(
    ends: tuple[LatentSender, LatentReceiver],
) -> None:
    """Each thread has a stream of its own; what is wrong is counted on the device, and looked at in the end."""
    making, using = torch.cuda.Stream(), torch.cuda.Stream()
    wrong = torch.zeros(MESSAGES, dtype=torch.int32, device=GPU)
    flow = Flow(*ends, pause=random_pauses(0, 2e-4))

    def make(number: int) -> Tensor:
        torch.cuda.set_stream(making)
        return torch.full(SHAPE, float(number), device=GPU)

    def use(number: int, shipment: Shipment) -> None:
        torch.cuda.set_stream(using)
        wrong[number : number + 1].copy_(shipment.wait().ne(number).sum(dtype=torch.int32).view(1))

    torch.cuda.set_sync_debug_mode("error")
    try:
        flow.run(make, use, MESSAGES)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert wrong.cpu().eq(0).all(), f"messages {wrong.cpu().nonzero().flatten().tolist()[:10]}"
    assert flow.under_way == BUFFERS


def test_transfers_go_on_under_a_long_kernel(ends: tuple[LatentSender, LatentReceiver]) -> None:
    """Messages that are ready come and go while another stream of the device computes for about a second."""
    computing, end = torch.cuda.Stream(), torch.cuda.Event()
    making, using = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(computing):
        torch.cuda._sleep(2_000_000_000)
        end.record()
    under_it: list[bool] = []

    def make(number: int) -> Tensor:
        torch.cuda.set_stream(making)
        return torch.full(SHAPE, float(number), device=GPU)

    def use(number: int, shipment: Shipment) -> None:
        torch.cuda.set_stream(using)
        latents = shipment.wait()
        shipment.synchronize()
        under_it.append(not end.query())
        assert latents.eq(number).all()

    Flow(*ends, pause=lambda: None).run(make, use, 20)
    assert under_it == [True] * 20
    end.synchronize()
