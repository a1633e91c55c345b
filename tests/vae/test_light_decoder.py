"""Light decoders: a TAEHV's frames as its plain form makes them, whatever the chunks, and files of other kinds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import CPU, relative_error, speech
from tape import Tapes
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from liveavatar_engine import Engine, EngineConfig
from liveavatar_engine.bench.command import main
from liveavatar_engine.errors import CheckpointError
from liveavatar_engine.runtime.graphs import PlainCalls, Recorder
from liveavatar_engine.vae.block_decoder import BlockDecoder
from liveavatar_engine.vae.light import LightDecoder, LightShape, load_decoder
from liveavatar_engine.vae.shape import VaeShape
from liveavatar_engine.vae.vae import LATENT_MEAN, LATENT_STD, Vae, load_vae

SHAPE = LightShape((12, 8, 8, 4), 2, (False, True, True), 16)
"""Of `random_state`; the published files have widths 256, 128, 64 and 64, and three blocks per level."""
State = dict[str, Tensor]


def random_state(
    widths: tuple[int, ...] = SHAPE.widths, doublings: tuple[int, ...] = (1, 2, 2), latent_channels: int = 16
) -> State:
    """What a file of TAEHV's form holds, an encoder's tensor included; two memory blocks per level."""
    generator = torch.Generator().manual_seed(1)

    def conv(name: str, channels_in: int, channels_out: int, side: int = 3, bias: bool = True) -> State:
        size = 1 / math.sqrt(channels_in * side * side)
        made = {f"{name}.weight": size * torch.randn(channels_out, channels_in, side, side, generator=generator)}
        return made | ({f"{name}.bias": 0.3 * torch.randn(channels_out, generator=generator)} if bias else {})

    state = conv("decoder.1", latent_channels, widths[0])
    number = 3
    for (width, above), times in zip(pairwise(widths), doublings, strict=True):
        for block in (number, number + 1):
            state |= conv(f"decoder.{block}.conv.0", 2 * width, width) | conv(f"decoder.{block}.conv.2", width, width)
            state |= conv(f"decoder.{block}.conv.4", width, width)
        state |= conv(f"decoder.{number + 3}.conv", width, times * width, side=1, bias=False)
        state |= conv(f"decoder.{number + 4}", width, above, bias=False)
        number += 5
    state |= conv(f"decoder.{number + 1}", widths[-1], 3) | conv("encoder.0", 3, 4)
    state[f"decoder.{number + 1}.weight"] /= 4
    state[f"decoder.{number + 1}.bias"] += 0.5
    return state


def plain_taehv(state: State, latents: Tensor) -> Tensor:
    """All frames at once, layer by layer, in taehv.py's order: [16, n, h, w] -> [4n - 3, 8h, 8w, 3] in [0, 1]."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    x = F.relu(conv("decoder.1", 3 * torch.tanh(latents.transpose(0, 1) / 3)))
    numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("decoder.")})
    for number in numbers[1:-1]:
        name = f"decoder.{number}"
        if f"{name}.conv.0.weight" in state:
            past = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
            y = F.relu(conv(f"{name}.conv.0", torch.cat((x, past), dim=1)))
            x = F.relu(conv(f"{name}.conv.4", F.relu(conv(f"{name}.conv.2", y))) + x)
        elif f"{name}.conv.weight" in state:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = conv(f"{name}.conv", x).unflatten(1, (-1, x.shape[1])).flatten(0, 1)
        else:
            x = conv(name, x)
    return conv(f"decoder.{numbers[-1]}", F.relu(x)).clamp(0, 1)[3:].permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def state() -> State:
    return random_state()


@pytest.fixture(scope="module")
def file(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("light") / "taew2_1.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def light(file: Path) -> LightDecoder:
    return LightDecoder.load(file, torch.float32, CPU)


def _latents(count: int, seed: int = 0, rows: int = 8, columns: int = 6) -> Tensor:
    return 2 * torch.randn(16, count, rows, columns, generator=torch.Generator().manual_seed(seed))


def _decoder(light: LightDecoder, recorder: Recorder | None = None, dtype: torch.dtype = torch.float32) -> BlockDecoder:
    return BlockDecoder(light, 8, 6, 3, recorder or PlainCalls(), dtype)


def test_sizes_follow_from_the_tensors(light: LightDecoder) -> None:
    assert light.shape == SHAPE
    assert light.normalised


@pytest.mark.parametrize(("rows", "columns"), [(8, 6), (3, 5)])
def test_frames_are_those_of_the_plain_form(light: LightDecoder, state: State, rows: int, columns: int) -> None:
    latents = _latents(8, rows=rows, columns=columns)
    ours = BlockDecoder(light, rows, columns, 3, PlainCalls(), torch.float32).stream().decode(latents)
    expected = plain_taehv(state, latents)
    assert ours.shape == (29, 8 * rows, 8 * columns, 3)
    assert relative_error(ours.add(1).div(2).clamp(0, 1), expected) <= 1e-5
    assert 0.2 < ((expected > 0) & (expected < 1)).float().mean() < 0.99, "some pixels are clamped, not all"


def test_frames_as_they_are_shown(light: LightDecoder, state: State) -> None:
    frames = _decoder(light, dtype=torch.uint8).stream().decode(_latents(4))
    assert frames.dtype == torch.uint8
    expected = plain_taehv(state, _latents(4)).mul(255).round()
    difference = (frames - expected).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


def test_frames_come_as_from_the_wan_decoder(light: LightDecoder, vae: Vae) -> None:
    """One for a video's first latent, four for every other; a frame shows the same latents."""
    ours, theirs = _decoder(light, dtype=torch.uint8).stream(), BlockDecoder(vae, 8, 6, 3, PlainCalls()).stream()
    for count in (1, 3, 2, 7):
        assert ours.decode(_latents(count)).shape == theirs.decode(_latents(count)).shape
    first, second = _latents(5), _latents(5)
    second[:, 3:] = 0
    a, b = (_decoder(light).stream().decode(latents) for latents in (first, second))
    assert torch.equal(a[:9], b[:9])
    assert not torch.equal(a[9], b[9])


@pytest.mark.parametrize("cuts", [(7,), (1, 4, 7), (2, 3, 9), (1, 2, 3, 4, 5, 6, 7, 8, 9)], ids=str)
def test_any_chunking_decodes_the_same_bits(light: LightDecoder, cuts: tuple[int, ...]) -> None:
    latents = _latents(10)
    stream = _decoder(light).stream()
    chunks = [stream.decode(latents[:, a:b]) for a, b in pairwise((0, *cuts, 10))]
    assert torch.equal(torch.cat(chunks), _decoder(light).stream().decode(latents))


def test_replays_give_the_same_bits(light: LightDecoder) -> None:
    recorder = Tapes()
    decoder = _decoder(light, recorder)
    streams = [decoder.stream(), decoder.stream()]
    assert recorder.recorded == 3, "the first latent, a single one, a chunk"
    for index, stream in enumerate(streams):
        for chunk in (7, 3, 1, 1, 3):
            stream.decode(_latents(chunk, seed=index))
    assert recorder.recorded == 3
    assert torch.equal(decoder.stream().decode(_latents(7)), _decoder(light).stream().decode(_latents(7)))


def test_streams_take_turns_without_a_trace(light: LightDecoder) -> None:
    decoder = _decoder(light)
    streams = [decoder.stream(), decoder.stream()]
    together: list[list[Tensor]] = [[], []]
    for turn in range(3):
        for index, stream in enumerate(streams):
            together[index].append(stream.decode(_latents(3, seed=10 * index + turn)))
    for index, frames in enumerate(together):
        alone = _decoder(light).stream()
        assert all(torch.equal(part, alone.decode(_latents(3, seed=10 * index + t))) for t, part in enumerate(frames))


def test_the_name_tells_which_latents(file: Path, state: State, tmp_path: Path) -> None:
    """`lighttaew2_1` has the tensors of `taew2_1` and wants the VAE's own latents."""
    theirs = tmp_path / "LightTAEW2_1.safetensors"
    save_file(state, theirs)
    unnormalised = load_decoder(theirs, torch.float32, CPU)
    assert isinstance(unnormalised, LightDecoder)
    assert not unnormalised.normalised
    latents = _latents(3)
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (LATENT_MEAN, LATENT_STD))
    expected = plain_taehv(state, latents * std + mean)
    ours = _decoder(unnormalised).stream().decode(latents)
    assert relative_error(ours.add(1).div(2).clamp(0, 1), expected) <= 1e-5
    other = file.rename(tmp_path / "mine.pth")
    with pytest.raises(CheckpointError, match=r"mine\.pth: .*tensors do not tell.*'taew2_1'.*'lighttae'"):
        load_decoder(other, torch.float32, CPU)
    assert LightDecoder.load(other, torch.float32, CPU, normalised=True).normalised
    other.rename(file)


def test_half_precision_files_are_loaded_in_the_dtype_asked_for(state: State, tmp_path: Path) -> None:
    path = tmp_path / "taew2_1.safetensors"
    save_file({name: tensor.half() for name, tensor in state.items()}, path)
    light = LightDecoder.load(path, torch.bfloat16, CPU)
    assert light.dtype == torch.bfloat16
    frames = _decoder(light, dtype=torch.uint8).stream().decode(_latents(4)).float()
    expected = plain_taehv(state, _latents(4)) * 255
    assert (frames - expected).square().mean().sqrt() < 6


def test_operations_are_counted(light: LightDecoder) -> None:
    class Counter(TorchDispatchMode):
        flops = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "causal_conv3d" in function._schema.name:
                made = result if isinstance(result, Tensor) else next(a for a in args[::-1] if isinstance(a, Tensor))
                self.flops += 2 * args[1].numel() * made.shape[:3].numel()
            return result

    stream = _decoder(light, dtype=torch.uint8).stream()
    stream.decode(_latents(1))
    with Counter() as counter:
        stream.decode(_latents(3))
    assert counter.flops == 3 * light.shape.flops(8, 6)


def _without(name: str) -> Callable[[], State]:
    return lambda: {key: tensor for key, tensor in random_state().items() if key != name}


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        pytest.param(
            lambda: {"a": torch.zeros(3)}, r"expected a TAEHV decoder.*or a Wan VAE's.*it holds a", id="other"
        ),
        pytest.param(_without("decoder.3.conv.2.bias"), r"1 missing: decoder\.3\.conv\.2\.bias", id="missing"),
        pytest.param(_without("decoder.6.conv.weight"), r"expected decoder\.6\.conv\.weight", id="no growth"),
        pytest.param(lambda: random_state() | {"extra": torch.zeros(1)}, "1 unexpected: extra", id="unexpected"),
        pytest.param(
            lambda: random_state() | {"decoder.1.weight": torch.zeros(12)}, r"expected decoder\.1\.weight", id="flat"
        ),
        pytest.param(
            lambda: random_state(doublings=(1, 2, 3)),
            r"decoder\.16\.conv\.weight is \[24, 8, 1, 1\], expected \[16, 8, 1, 1\]",
            id="tripled",
        ),
        pytest.param(lambda: random_state(doublings=(2, 2, 2)), "8 frames per latent, Wan 2.1 has 4", id="fast"),
        pytest.param(lambda: random_state((8, 8, 4), (2, 2)), "4 pixels per latent.*Wan 2.1 has 8", id="small"),
        pytest.param(lambda: random_state(latent_channels=48), "48 latent channels, Wan 2.1 has 16", id="Wan 2.2"),
    ],
)
def test_files_of_other_decoders(make: Callable[[], State], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "taew2_1.safetensors"
    save_file(make(), path)
    with pytest.raises(CheckpointError, match=rf"(?s)taew2_1\.safetensors: .*{complaint}"):
        load_decoder(path, torch.float32, CPU)


def test_damaged_files(tmp_path: Path) -> None:
    for name in ("taew2_1.pth", "taew2_1.safetensors"):
        path = tmp_path / name
        with pytest.raises(CheckpointError, match="no such file"):
            load_decoder(path, torch.float32, CPU)
        path.write_bytes(b"not weights")
        with pytest.raises(CheckpointError, match=r"taew2_1\..*damaged"):
            load_decoder(path, torch.float32, CPU)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "decoder alone"])
def test_a_narrow_wan_vae_is_a_decoder(whole: bool, tmp_path: Path) -> None:
    """LightVAE's files have the Wan VAE's names and a quarter of its widths."""
    narrow = Vae(VaeShape.wan21(width=4)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in narrow.state_dict().items()}
    torch.save(state, tmp_path / "all.pth")
    path = tmp_path / "lightvaew2_1.safetensors"
    save_file({n: t for n, t in state.items() if whole or n.startswith(("decoder.", "conv2."))}, path)
    decoder = load_decoder(path, torch.float32, CPU)
    assert isinstance(decoder, Vae)
    assert not hasattr(decoder, "encoder")
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert VaeShape.of_tensors(shapes) == VaeShape.wan21(width=4)
    expected = load_vae(tmp_path / "all.pth", torch.float32, CPU).decoder_stream().decode(_latents(3))
    assert torch.equal(decoder.decoder_stream().decode(_latents(3)), expected)
    frames = BlockDecoder(decoder, 8, 6, 3, PlainCalls()).stream().decode(_latents(3))
    assert frames.shape == (9, 64, 48, 3)
    del state["decoder.head.2.bias"]
    torch.save(state, path.with_suffix(".pth"))
    with pytest.raises(CheckpointError, match=r"lightvaew2_1\.pth: .*\n.*1 missing: decoder\.head\.2\.bias"):
        load_decoder(path.with_suffix(".pth"), torch.float32, CPU)


def test_an_engine_shows_its_frames(file: Path, checkpoint: Path, face: np.ndarray) -> None:
    config = EngineConfig(devices="cpu", size="64x64")
    chunks = []
    for vae in (file, None):
        engine = Engine.from_pretrained(checkpoint, config=config, vae=vae)
        chunks.append(list(engine.generate(face, speech(1.0), seed=1)))
    ours, wan = chunks
    assert [chunk.frames.shape for chunk in ours] == [chunk.frames.shape for chunk in wan]
    assert [chunk.start_column for chunk in ours] == [chunk.start_column for chunk in wan]
    assert not any(np.array_equal(one.frames, other.frames) for one, other in zip(ours, wan, strict=True))
    with pytest.raises(CheckpointError, match="no such file"):
        Engine.from_pretrained(checkpoint, config=config, vae=file.with_name("taew2_1-absent.pth"))


def test_the_benchmark_gives_it_a_row(file: Path, tmp_path: Path) -> None:
    target = tmp_path / "vae.json"
    point = ["--preset", "tiny", "--size", "64x64", "--device", "cpu", "--blocks", "2", "--warmup", "1"]
    assert main(["vae", *point, "--vae", str(file), "--json", str(target)]) == 0
    (run,) = json.loads(target.read_text())["runs"]
    assert run["figures"]["light_decode_ms_p50"]["value"] > 0
    assert run["figures"]["light_psnr_db"]["value"] < 40, "random weights show something else"
    assert len(run["series"]["light_decode_ms"]["values"]) == 2
    assert any(file.name in stage["name"] for stage in run["stages"])
