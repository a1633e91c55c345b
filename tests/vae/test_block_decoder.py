"""The decoder over static buffers: the plain decoder's frames, whatever the chunks, as recorded work."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support import CPU, relative_error
from tape import Tapes

from liveavatar_engine.bench.counting import Counter
from liveavatar_engine.errors import ModelError
from liveavatar_engine.runtime.graphs import PlainCalls, Recorder
from liveavatar_engine.vae.block_decoder import BlockDecoder
from liveavatar_engine.vae.light import LightDecoder
from liveavatar_engine.vae.vae import Vae, load_vae, to_uint8


def _latents(count: int, seed: int = 0, rows: int = 8, columns: int = 6) -> torch.Tensor:
    return torch.randn(16, count, rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["wan", "light"])
def either(request: pytest.FixtureRequest) -> Vae | LightDecoder:
    """Weights of either kind of decoder, which have the same contract."""
    return request.getfixturevalue("vae" if request.param == "wan" else "light")


def _decoder(
    vae: Vae | LightDecoder, recorder: Recorder | None = None, dtype: torch.dtype = torch.float32, most: int = 3
) -> BlockDecoder:
    return BlockDecoder(vae, 8, 6, most, recorder or PlainCalls(), dtype)


@pytest.mark.parametrize(("rows", "columns"), [(8, 6), (5, 9)])
def test_frames_are_those_of_the_plain_decoder(rows: int, columns: int, vae: Vae) -> None:
    latents = _latents(10, rows=rows, columns=columns)
    expected = vae.decoder_stream().decode(latents).permute(1, 2, 3, 0)
    ours = BlockDecoder(vae, rows, columns, 3, PlainCalls(), torch.float32).stream().decode(latents)
    assert relative_error(ours.clamp(-1, 1), expected) <= 1e-5


@pytest.mark.parametrize("cuts", [(7,), (1, 4, 7), (2, 3, 9), (1, 2, 3, 4, 5, 6, 7, 8, 9)], ids=str)
def test_any_chunking_decodes_the_same_bits(cuts: tuple[int, ...], either: Vae | LightDecoder) -> None:
    latents = _latents(10)
    stream = _decoder(either).stream()
    chunks = [stream.decode(latents[:, a:b]) for a, b in pairwise((0, *cuts, 10))]
    assert torch.equal(torch.cat(chunks), _decoder(either).stream().decode(latents))


def test_replays_give_the_same_bits(either: Vae | LightDecoder) -> None:
    recorder = Tapes()
    decoder = _decoder(either, recorder)
    streams = [decoder.stream(), decoder.stream()]
    assert recorder.recorded == 3, "the first latent, a single one, a chunk"
    for index, stream in enumerate(streams):
        for chunk in (7, 3, 1, 1, 3):
            stream.decode(_latents(chunk, seed=index))
    assert recorder.recorded == 3
    assert torch.equal(decoder.stream().decode(_latents(7)), _decoder(either).stream().decode(_latents(7)))


def test_streams_take_turns_without_a_trace(either: Vae | LightDecoder) -> None:
    decoder = _decoder(either)
    streams = [decoder.stream() for _ in range(3)]
    together: list[list[torch.Tensor]] = [[], [], []]
    for turn in range(4):
        for index, stream in enumerate(streams):
            together[index].append(stream.decode(_latents(3, seed=10 * index + turn)))
    streams[0].close()
    streams[1].decode(_latents(1))
    assert streams[0].kept is None
    for index in range(3):
        alone = _decoder(either).stream()
        for turn, frames in enumerate(together[index]):
            assert torch.equal(frames, alone.decode(_latents(3, seed=10 * index + turn)))


def test_frames_as_they_are_shown(vae: Vae) -> None:
    frames = _decoder(vae, dtype=torch.uint8).stream().decode(_latents(4))
    assert frames.dtype == torch.uint8
    assert frames.shape == (13, 64, 48, 3)
    expected = to_uint8(vae.decoder_stream().decode(_latents(4)))
    difference = (frames.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


def test_a_latent_alone_is_one_of_the_block(vae: Vae) -> None:
    """The first frames can be shown before the rest of their block is decoded."""
    stream, whole = _decoder(vae).stream(), _decoder(vae).stream()
    for decoder in (stream, whole):
        decoder.decode(_latents(7, seed=3))
    block = _latents(3)
    early, late = stream.decode(block[:, :1]), stream.decode(block[:, 1:])
    assert torch.equal(torch.cat((early, late)), whole.decode(block))


def test_another_stream_that_is_opened_disturbs_nobody(vae: Vae) -> None:
    decoder = _decoder(vae)
    stream, alone = decoder.stream(), _decoder(vae).stream()
    for count in (7, 3):
        stream.decode(_latents(count))
        alone.decode(_latents(count))
    decoder.stream().close()
    assert torch.equal(stream.decode(_latents(3, seed=1)), alone.decode(_latents(3, seed=1)))


def test_a_block_is_few_operations_that_move_little(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied but what convolutions look back to, latents on their way in and frames on their way out."""
    monkeypatch.undo()  # poisoning memory is an operation, too
    decoder, plain = _decoder(vae, dtype=torch.uint8), vae.decoder_stream()
    stream = decoder.stream()
    counts = []
    for decode in (stream.decode, lambda latents: to_uint8(plain.decode(latents))):
        decode(_latents(7))
        with torch.inference_mode(), Counter() as counter:
            decode(_latents(3, seed=1))
        counts.append(counter)
    ours, theirs = counts
    assert ours.operations <= 110
    assert theirs.operations > 9 * ours.operations
    frames, latents = 12 * 64 * 48 * 3, _latents(3).nbytes
    assert ours.copied_bytes <= decoder.history_bytes + frames + 3 * latents
    assert theirs.copied_bytes > 5 * ours.copied_bytes


def test_values_beyond_fp16_are_an_error(checkpoint: Path) -> None:
    """Rather than a black picture."""
    narrow = load_vae(checkpoint / "Wan2.1_VAE.pth", torch.float16, CPU)
    stream = _decoder(narrow, dtype=torch.uint8).stream()
    stream.skip(_latents(7))
    stream.check()
    narrow.decoder.conv1.weight.data *= 1e4
    loud = _decoder(narrow, dtype=torch.uint8).stream()
    loud.skip(_latents(7))
    with pytest.raises(ModelError, match="beyond float16.*wider vae_precision"):
        loud.check()


def test_memory_is_flat_over_a_thousand_blocks(checkpoint: Path) -> None:
    """Peak memory of the process after 1,000 blocks is what it was after 100; measured in a process of its own."""
    script = """
import resource, sys
from pathlib import Path
import torch
from liveavatar_engine.runtime.graphs import PlainCalls
from liveavatar_engine.runtime.timing import StageTimer
from liveavatar_engine.vae.block_decoder import BlockDecoder
from liveavatar_engine.vae.vae import load_vae
torch.set_num_threads(1)
cpu = torch.device("cpu")
stream = BlockDecoder(load_vae(Path(sys.argv[1]), torch.float32, cpu), 2, 2, 3, PlainCalls()).stream()
latents = torch.randn(16, 3, 2, 2)
for block in range(1000):
    stream.start(latents, StageTimer(cpu)).wait()
    if block == 100:
        early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early) / 1024)
"""
    command = [sys.executable, "-c", script, str(checkpoint / "Wan2.1_VAE.pth")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert float(run.stdout) < 2, f"peak memory grew by {run.stdout.strip()} MB in 900 blocks"
