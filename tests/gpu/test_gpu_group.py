"""Exchanges over NCCL in captured steps: one rank that sends to itself, as a machine with one GPU has no other."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from streams import Streams
from support import relative_error

from liveavatar_engine.denoise import executor as executor_module
from liveavatar_engine.model.sequence import Strips
from liveavatar_engine.runtime.graphs import CudaGraphs, PlainCalls
from liveavatar_engine.runtime.group import BackendGroup
from liveavatar_engine.weights.network import load_network

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU = torch.device("cuda:0")


@pytest.fixture
def group() -> Iterator[BackendGroup]:
    backend = dist.ProcessGroupNCCL(dist.HashStore(), 0, 1, dist.ProcessGroupNCCL.Options())
    yield BackendGroup(backend)
    backend.shutdown()


def test_captured_exchanges_are_replayed_with_what_is_there_then(group: BackendGroup) -> None:
    rows, made = torch.zeros(6, 4, device=GPU, dtype=torch.bfloat16), torch.zeros(2, 6, 4, device=GPU)
    recorder = CudaGraphs(GPU)

    def work() -> None:
        made[0].copy_(group.all_to_all(rows + 1, [6], [6]))
        made[1].copy_(group.gather(rows + 2))

    with recorder.stream():
        replay = recorder.record(work)
        for value in (3, 7):
            rows.fill_(value)
            torch.cuda.set_sync_debug_mode("error")
            try:
                replay()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert made.unique().tolist() == [value + 1, value + 2]


def test_captured_steps_with_exchanges_have_the_bits_of_plain_ones(
    group: BackendGroup, checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_network(checkpoint, None, torch.bfloat16, GPU)
    alone = Streams(network).run(4)
    monkeypatch.setattr(
        executor_module,
        "token_splits",
        lambda geometry, _: (Strips(group, geometry.tokens_per_frame), Strips(group, geometry.sink_tokens)),
    )
    plain = Streams(network, record_with=PlainCalls()).run(4)
    captured = Streams(network, record_with=CudaGraphs(GPU)).run(4)
    for block, latents in enumerate(plain):
        assert captured[block].equal(latents), f"block {block}"
        assert relative_error(latents, alone[block]) <= 2 * 2**-8, f"block {block}"
