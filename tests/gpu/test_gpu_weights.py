"""Weights on a GPU: read through locked buffers, quantised there, offloaded; the same bits as on a CPU.

Imports nothing beyond torch, numpy, safetensors, transformers and pytest: the machine with the GPU has no more.
"""

from pathlib import Path

import pytest
import torch
from support import CPU, GOLDEN, bits
from torch import nn

from liveavatar_engine.conditions.still import still_conditions
from liveavatar_engine.conditions.text import TextEncoder, _load_encoder
from liveavatar_engine.config.engine import REFERENCE_FP8_SKIP
from liveavatar_engine.model import Network
from liveavatar_engine.pipeline.offload import OffloadedVae
from liveavatar_engine.vae.vae import load_vae
from liveavatar_engine.weights.budget import free_memory
from liveavatar_engine.weights.convert import convert_checkpoint
from liveavatar_engine.weights.layout import Checkpoint
from liveavatar_engine.weights.network import load_network
from liveavatar_engine.weights.offload import CudaFetcher, LayerVisits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU = torch.device("cuda:0")
LORA = GOLDEN / "lora.safetensors"


def _same(one: Network, other: Network) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(
        bits(tensor.cpu()).equal(bits(others[name].cpu())) for name, tensor in mine.items()
    )


@pytest.mark.parametrize("skip", [None, REFERENCE_FP8_SKIP, ()], ids=["bf16", "fp8", "all in fp8"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
def test_a_network_is_the_same_as_on_a_cpu(lora: Path | None, skip, checkpoint: Path) -> None:
    on_gpu, on_cpu = (load_network(checkpoint, lora, torch.bfloat16, device, fp8_skip=skip) for device in (GPU, CPU))
    assert {parameter.device for parameter in on_gpu.parameters()} == {GPU}
    assert _same(on_gpu, on_cpu)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_a_converted_network_is_the_same(device: torch.device, checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "fp8", lora=LORA, device=device, shard_bytes=100_000)
    converted = load_network(tmp_path / "fp8", None, torch.bfloat16, GPU, fp8_skip=REFERENCE_FP8_SKIP)
    assert _same(converted, load_network(checkpoint, LORA, torch.bfloat16, GPU, fp8_skip=REFERENCE_FP8_SKIP))


def test_an_offloaded_prompt_reads_the_same(checkpoint: Path) -> None:
    weights = Checkpoint(checkpoint).text_encoder
    plain = TextEncoder(_load_encoder(weights, torch.bfloat16, GPU), None, GPU)
    offloaded = TextEncoder(_load_encoder(weights, torch.bfloat16, CPU), None, GPU, CudaFetcher(GPU))
    mask = torch.ones(32, dtype=torch.int64)
    plain.encode(mask, mask)  # libraries take their workspaces
    before = torch.cuda.memory_allocated(GPU)
    for seed in range(3):
        ids = torch.randint(0, 100, (32,), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(offloaded.encode(ids, mask), plain.encode(ids, mask))
    assert torch.cuda.memory_allocated(GPU) == before


def test_two_layers_at_most_are_on_the_gpu() -> None:
    """Layers large enough that the host is far ahead of the copies."""
    layers = [nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16) for _ in range(12)]
    exact = torch.eye(8, 4096, dtype=torch.bfloat16, device=GPU)
    expected = exact
    for layer in layers:
        expected = nn.functional.linear(expected, layer.weight.to(GPU))
    visits = LayerVisits(layers, CudaFetcher(GPU))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    with visits, torch.inference_mode():
        x = exact
        for layer in layers:
            x = layer(x)
    assert torch.equal(x, expected)
    peak = torch.cuda.max_memory_allocated(GPU) - before
    assert peak < 2.5 * layers[0].weight.nbytes


def test_an_offloaded_vae_works_the_same(checkpoint: Path) -> None:
    path = Checkpoint(checkpoint).vae
    plain = load_vae(path, torch.float32, GPU)
    offloaded = OffloadedVae.of(load_vae(path, torch.float32, CPU), CudaFetcher(GPU))
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours, theirs = still_conditions(offloaded, picture), still_conditions(plain, picture)
    assert torch.equal(ours.motion, theirs.motion)
    streams = offloaded.decoder_stream(), plain.decoder_stream()
    for _ in range(2):
        one, other = (stream.decode(theirs.priming[:, :2]) for stream in streams)
        assert torch.equal(one, other)
    assert {parameter.device for parameter in offloaded.parameters()} == {CPU}


def test_free_memory_is_told() -> None:
    assert 10**8 < (free_memory(GPU) or 0) < 10**13
