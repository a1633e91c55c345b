"""Offloaded weights: the same results, a bounded stay on the device, and nothing left there."""

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_fetcher import FakeFetcher
from support import CPU, speech
from torch import nn

from liveavatar_engine import Engine, EngineConfig
from liveavatar_engine.conditions.still import still_conditions
from liveavatar_engine.conditions.text import TextEncoder
from liveavatar_engine.errors import DeviceMemoryError
from liveavatar_engine.pipeline import encoders
from liveavatar_engine.pipeline.offload import OffloadedVae, fetchers, offloaded_parts
from liveavatar_engine.vae.vae import Vae, load_vae
from liveavatar_engine.weights import offload
from liveavatar_engine.weights.layout import Checkpoint
from liveavatar_engine.weights.offload import CudaFetcher, HostWeights, LayerVisits, Visit

CUDA = torch.device("cuda", 0)


def _text(checkpoint: Path, fetcher: FakeFetcher | None = None, dtype: torch.dtype = torch.float32) -> TextEncoder:
    files = Checkpoint(checkpoint)
    return TextEncoder.load(files.text_encoder, files.tokenizer, dtype, CPU, fetcher)


def _vae(checkpoint: Path) -> Vae:
    return load_vae(Checkpoint(checkpoint).vae, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_reads_the_same(dtype: torch.dtype, checkpoint: Path) -> None:
    fetcher = FakeFetcher()
    offloaded, plain = _text(checkpoint, fetcher, dtype), _text(checkpoint, dtype=dtype)
    assert fetcher.fetched == 0
    for count, prompt in enumerate(("a man talks", "", "a woman sings " * 40), 1):
        assert torch.equal(offloaded.context(prompt, 32), plain.context(prompt, 32))
        assert fetcher.live == 0
        assert fetcher.fetched == count * fetcher.kept


def test_two_layers_at_most_are_on_the_device(checkpoint: Path) -> None:
    fetcher = FakeFetcher()
    text = _text(checkpoint, fetcher)
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in text._encoder.encoder.block]
    text.context("a man talks", 32)
    assert len(layers) >= 2
    assert fetcher.peak == max(one + other for one, other in pairwise(layers))
    assert fetcher.kept == sum(layers), "the table of tokens is not fetched"


def test_nothing_stays_on_the_device_after_an_error(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher = FakeFetcher()
    text = _text(checkpoint, fetcher)
    expected = text.context("a man talks", 32)
    second = text._encoder.encoder.block[1]
    forward = second.forward

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(second, "forward", fail)
    with pytest.raises(MemoryError):
        text.context("a man talks", 32)
    assert fetcher.live == 0
    monkeypatch.setattr(second, "forward", forward)
    assert torch.equal(text.context("a man talks", 32), expected)


def test_prompts_of_several_threads_wait_for_each_other(checkpoint: Path) -> None:
    fetcher = FakeFetcher()
    text, prompts = _text(checkpoint, fetcher), [f"prompt {number}" for number in range(6)]
    expected = [text.context(prompt, 32) for prompt in prompts]
    results: dict[str, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda prompt=prompt: results.update({prompt: text.context(prompt, 32)}))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[prompt], context) for prompt, context in zip(prompts, expected, strict=True))
    assert fetcher.live == 0


def test_a_vae_encodes_and_decodes_the_same(checkpoint: Path) -> None:
    fetcher, plain = FakeFetcher(), _vae(checkpoint)
    offloaded = OffloadedVae.of(_vae(checkpoint), fetcher)
    size = sum(parameter.nbytes for parameter in plain.parameters())
    assert fetcher.kept == size
    picture = torch.rand(3, 64, 64) * 2 - 1
    ours, theirs = still_conditions(offloaded, picture), still_conditions(plain, picture)
    assert torch.equal(ours.motion, theirs.motion)
    assert fetcher.live == 0
    for frames in (offloaded.encode([picture] * 5), iter(plain.encode([picture] * 5))):
        assert len(list(frames)) == 2
    assert fetcher.live == 0
    streams = offloaded.decoder_stream(), plain.decoder_stream()
    for _ in range(2):
        one, other = (stream.decode(theirs.priming[:, :2]) for stream in streams)
        assert torch.equal(one, other)
        assert fetcher.live == 0
    assert fetcher.peak < size, "encoder and decoder come one at a time"


def test_an_abandoned_encoding_leaves_the_device(checkpoint: Path) -> None:
    fetcher = FakeFetcher()
    latents = OffloadedVae.of(_vae(checkpoint), fetcher).encode([torch.zeros(3, 64, 64)] * 9)
    next(latents)
    assert fetcher.live > 0
    latents.close()
    assert fetcher.live == 0


def test_users_at_the_same_time_share_one_stay() -> None:
    fetcher, layer = FakeFetcher(), nn.Linear(8, 8)
    visit = Visit(HostWeights(layer, fetcher))
    with visit, visit:
        with pytest.raises(ZeroDivisionError), visit:
            raise ZeroDivisionError
        assert fetcher.live == fetcher.fetched == 8 * 9 * 4
        layer(torch.zeros(1, 8))
    assert fetcher.live == 0


def test_layers_that_run_without_a_visit_are_a_mistake() -> None:
    layers = [nn.Linear(4, 4) for _ in range(3)]
    visits = LayerVisits(layers, FakeFetcher())
    with pytest.raises(AssertionError):
        layers[1](torch.zeros(1, 4))
    with visits:
        for layer in layers:
            layer(torch.zeros(1, 4))


def test_locked_memory_is_shared_out_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of `CudaFetcher` that needs no GPU."""
    locked: list[int] = []

    def lock(count: int) -> torch.Tensor:
        locked.append(count)
        return torch.empty(count, dtype=torch.uint8)

    monkeypatch.setattr(offload, "_locked", lock)
    monkeypatch.setattr(offload, "_SLAB", 10_000)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    fetcher = CudaFetcher(CUDA)
    tensors = [torch.randn(rows, 7).to(dtype) for rows in (1, 50, 333, 3, 90) for dtype in (torch.float32, torch.int8)]
    kept = [fetcher.keep(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, copy)
        assert copy.dtype == tensor.dtype
        assert copy.storage_offset() * copy.element_size() % 256 == 0
    assert locked == [10_000] * len(locked)
    assert len(locked) == 3


def test_memory_that_cannot_be_locked_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(DeviceMemoryError, match=r"host: 0.54 GB of memory cannot be locked for offloaded weights"):
        offload._locked(offload._SLAB)


def test_a_cpu_offloads_nothing() -> None:
    config = EngineConfig(devices="cpu", offload=["text_encoder", "vae"])
    assert offloaded_parts(config, CPU) == ()
    assert fetchers(config, CPU) == {}
    assert offloaded_parts(config, CUDA) == ("text_encoder", "vae")
    assert offloaded_parts(EngineConfig(), CUDA) == ("text_encoder",)


def test_an_engine_makes_the_same_frames(checkpoint: Path, face: np.ndarray, monkeypatch) -> None:
    def frames(engine: Engine) -> np.ndarray:
        return next(iter(engine.generate(face, speech(0.5), "hello", seed=1))).frames

    plain = frames(Engine.from_pretrained(checkpoint, config=EngineConfig(size="64x64", devices="cpu")))
    for parts, most in ((("text_encoder",), 0), (("text_encoder", "vae"), 1)):
        config, fetcher = EngineConfig(size="64x64", devices="cpu", offload=parts), FakeFetcher()
        monkeypatch.setattr(encoders, "fetchers", lambda config, _, f=fetcher: dict.fromkeys(config.offload, f))
        engine = Engine.from_pretrained(checkpoint, config=config)
        assert fetcher.fetched == 0
        difference = np.abs(frames(engine).astype(int) - plain.astype(int)).max()
        assert difference <= most, "an offloaded VAE adds in another order, in front of the rounding to 8 bits"
        assert fetcher.fetched >= fetcher.kept
        assert fetcher.live == 0
