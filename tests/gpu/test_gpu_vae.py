"""The decoder over static buffers on a GPU: captured, overlapped, taking turns, and as exact as on a CPU."""

import pytest
import torch
from support import relative_error

from liveavatar_engine.runtime.graphs import CudaGraphs, PlainCalls
from liveavatar_engine.runtime.timing import StageTimer
from liveavatar_engine.vae.block_decoder import BlockDecoder
from liveavatar_engine.vae.delivery import DeviceFrames
from liveavatar_engine.vae.vae import Vae, load_vae
from liveavatar_engine.weights.layout import Checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU = torch.device("cuda:0")


def _latents(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(16, count, 8, 6, generator=torch.Generator().manual_seed(seed)).to(GPU)


def _vae(checkpoint, dtype: torch.dtype) -> Vae:
    return load_vae(Checkpoint(checkpoint).vae, dtype, GPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_replays_and_plain_calls_give_the_same_bits(dtype: torch.dtype, checkpoint) -> None:
    vae = _vae(checkpoint, dtype)
    streams = [BlockDecoder(vae, 8, 6, 3, recorder).stream() for recorder in (CudaGraphs(GPU), PlainCalls())]
    for count in (7, 3, 1, 1, 3):
        replayed, plain = (stream.decode(_latents(count, seed=count)) for stream in streams)
        assert torch.equal(replayed, plain)


def test_frames_are_those_of_the_cpu(checkpoint) -> None:
    ours = BlockDecoder(_vae(checkpoint, torch.float32), 8, 6, 3, CudaGraphs(GPU), torch.float32)
    cpu = load_vae(Checkpoint(checkpoint).vae, torch.float32, torch.device("cpu"))
    expected = BlockDecoder(cpu, 8, 6, 3, PlainCalls(), torch.float32).stream().decode(_latents(10).cpu())
    assert relative_error(ours.stream().decode(_latents(10)).cpu(), expected) <= 1e-5


def test_frames_on_their_way_are_not_overtaken(checkpoint) -> None:
    """Many blocks are started before the first is waited for, while something else keeps the callers' stream busy."""
    decoder = BlockDecoder(_vae(checkpoint, torch.bfloat16), 8, 6, 3, CudaGraphs(GPU))
    alone, stream = decoder.stream(), decoder.stream()
    expected = [alone.decode(_latents(3, seed)).cpu() for seed in range(20)]
    pending, timers = [], [StageTimer(GPU) for _ in range(20)]
    for seed, timer in enumerate(timers):
        pending.append(stream.start(_latents(3, seed), timer))
        torch.randn(512, 512, device=GPU) @ torch.randn(512, 512, device=GPU)
    for frames, timer, truth in zip(pending, timers, expected, strict=True):
        assert torch.equal(torch.from_numpy(frames.wait()), truth)
        assert timer.seconds()["decode"] > 0


def test_frames_may_stay_on_the_device(checkpoint) -> None:
    vae = _vae(checkpoint, torch.bfloat16)
    kept = BlockDecoder(vae, 8, 6, 3, CudaGraphs(GPU), delivery=DeviceFrames()).stream()
    expected = BlockDecoder(vae, 8, 6, 3, PlainCalls()).stream()
    for count in (7, 3, 3):
        frames = kept.start(_latents(count), StageTimer(GPU)).wait()
        assert isinstance(frames, torch.Tensor)
        assert frames.is_cuda
        assert torch.equal(torch.from_dlpack(frames), expected.decode(_latents(count)))


def test_streams_take_turns_without_a_trace(checkpoint) -> None:
    decoder = BlockDecoder(_vae(checkpoint, torch.bfloat16), 8, 6, 3, CudaGraphs(GPU))
    streams = [decoder.stream() for _ in range(2)]
    together = [[stream.decode(_latents(3, 10 * i + turn)) for i, stream in enumerate(streams)] for turn in range(4)]
    for index in range(2):
        alone = decoder.stream()
        for turn in range(4):
            assert torch.equal(together[turn][index], alone.decode(_latents(3, 10 * index + turn)))


def test_memory_is_flat(checkpoint) -> None:
    decoder = BlockDecoder(_vae(checkpoint, torch.bfloat16), 8, 6, 3, CudaGraphs(GPU))
    stream = decoder.stream()
    held = []
    for block in range(60):
        stream.start(_latents(3), StageTimer(GPU)).wait()
        if block in (10, 59):
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_reserved(GPU))
    assert held[0] == held[1]
