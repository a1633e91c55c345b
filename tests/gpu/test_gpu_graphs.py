"""Captured steps on a GPU: no host sync, no allocation and no capture in a stream, whatever changes in it."""

import pytest
import torch
from streams import STEPS, Streams
from support import speech

from liveavatar_engine.conditions.audio_encoder import AudioEncoder
from liveavatar_engine.conditions.audio_features import window_samples
from liveavatar_engine.conditions.audio_window import AudioWindow, column_moments
from liveavatar_engine.runtime.graphs import CudaGraphs, PlainCalls
from liveavatar_engine.weights.layout import Checkpoint
from liveavatar_engine.weights.network import load_network

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU = torch.device("cuda:0")


@pytest.fixture
def network(checkpoint):
    return load_network(checkpoint, None, torch.bfloat16, GPU)


class Counted(CudaGraphs):
    """Counts what it captures."""

    captured = 0

    def record(self, work):
        self.captured += 1
        return super().record(work)


@pytest.mark.parametrize("diagonal", [False, True], ids=["sequential", "diagonal"])
def test_no_host_sync_in_a_block(diagonal: bool, network) -> None:
    streams = Streams(network, diagonal=diagonal)
    stream = streams.open(update_after=STEPS + 3)
    streams.push(stream)
    for _ in range(STEPS + 1):  # the first block is checked for NaN, with a sync
        streams.push(stream)
    config = network.config
    states = torch.randn(1, config.audio_layers, config.audio_dim, 12, device=GPU)
    noise = streams.draw(1, *streams.geometry.block_shape)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            stream.push(noise, states)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stream.scene.sink == 1, "the sink has changed meanwhile"


def test_sessions_prompts_and_sinks_neither_allocate_nor_capture(network) -> None:
    recorder = Counted(GPU)
    streams = Streams(network, sessions=2, record_with=recorder)
    streams.executor.warm_up()
    captured = recorder.captured
    reserved = []
    for seed in range(4):
        stream = streams.open(session=seed % 2, seed=seed)
        for index in range(5):
            if index == 1:
                stream.change_prompt(streams.context(7))
            streams.push(stream, seed)
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved(GPU))
    assert recorder.captured == captured == STEPS + 1 + network.config.num_layers + 1
    assert reserved[1:] == reserved[:1] * 3, "device memory grew after the first session"


def test_company_changes_no_bit(network) -> None:
    alone = [Streams(network).run(4, seed=seed) for seed in range(2)]
    streams = Streams(network, sessions=2)
    pair = [streams.open(session=index, seed=index) for index in range(2)]
    for block in range(4):
        for index in range(2):
            (latents,) = streams.push(pair[index], index)
            assert torch.equal(latents, alone[index][block]), f"session {index} block {block}"


def test_a_captured_window_of_speech_gives_the_bits_of_plain_calls(checkpoint) -> None:
    encoder = AudioEncoder.load(Checkpoint(checkpoint).audio_encoder, GPU)
    samples = window_samples(12)
    captured, plain = (AudioWindow(encoder, samples, 12, recorder) for recorder in (CudaGraphs(GPU), PlainCalls()))
    for block in range(3):
        audio = speech(8, seed=block)[:samples]
        moments = column_moments(12 * block, 12, 0, 270)
        assert torch.equal(captured.columns(audio, moments), plain.columns(audio, moments)), f"block {block}"
