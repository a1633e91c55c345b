"""Light decoders: a TAEHV's frames as its plain form makes them, whatever the chunks, and files of other kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import CPU, relative_error, speech
from taehv_weights import SHAPE, State, plain_taehv, random_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from liveavatar_engine import Engine, EngineConfig
from liveavatar_engine.bench.command import main
from liveavatar_engine.errors import CheckpointError
from liveavatar_engine.runtime.graphs import PlainCalls, Recorder
from liveavatar_engine.vae.block_decoder import BlockDecoder
from liveavatar_engine.vae.light import LightDecoder, load_decoder
from liveavatar_engine.vae.shape import VaeShape
from liveavatar_engine.vae.vae import LATENT_MEAN, LATENT_STD, Vae, load_vae


def _latents(count: int, seed: int = 0, rows: int = 8, columns: int = 6) -> Tensor:
    return 2 * torch.randn(16, count, rows, columns, generator=torch.Generator().manual_seed(seed))


def _decoder(light: LightDecoder, recorder: Recorder | None = None, dtype: torch.dtype = torch.float32) -> BlockDecoder:
    return BlockDecoder(light, 8, 6, 3, recorder or PlainCalls(), dtype)


def test_sizes_follow_from_the_tensors(light: LightDecoder) -> None:
    assert light.shape == SHAPE
    assert light.normalised


@pytest.mark.parametrize(("rows", "columns"), [(8, 6), (3, 5)])
def test_frames_are_those_of_the_plain_form(light: LightDecoder, light_state: State, rows: int, columns: int) -> None:
    latents = _latents(8, rows=rows, columns=columns)
    ours = BlockDecoder(light, rows, columns, 3, PlainCalls(), torch.float32).stream().decode(latents)
    expected = plain_taehv(light_state, latents)
    assert ours.shape == (29, 8 * rows, 8 * columns, 3)
    assert relative_error(ours.add(1).div(2).clamp(0, 1), expected) <= 1e-5
    assert 0.2 < ((expected > 0) & (expected < 1)).float().mean() < 0.99, "some pixels are clamped, not all"


def test_frames_as_they_are_shown(light: LightDecoder, light_state: State) -> None:
    frames = _decoder(light, dtype=torch.uint8).stream().decode(_latents(4))
    assert frames.dtype == torch.uint8
    expected = plain_taehv(light_state, _latents(4)).mul(255).round()
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


def test_the_name_tells_which_latents(light_file: Path, light_state: State, tmp_path: Path) -> None:
    """`lighttaew2_1` has the tensors of `taew2_1` and wants the VAE's own latents."""
    theirs = tmp_path / "LightTAEW2_1.safetensors"
    save_file(light_state, theirs)
    unnormalised = load_decoder(theirs, torch.float32, CPU)
    assert isinstance(unnormalised, LightDecoder)
    assert not unnormalised.normalised
    latents = _latents(3)
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (LATENT_MEAN, LATENT_STD))
    expected = plain_taehv(light_state, latents * std + mean)
    ours = _decoder(unnormalised).stream().decode(latents)
    assert relative_error(ours.add(1).div(2).clamp(0, 1), expected) <= 1e-5
    other = light_file.rename(tmp_path / "mine.pth")
    with pytest.raises(CheckpointError, match=r"mine\.pth: .*tensors do not tell.*'taew2_1'.*'lighttae'"):
        load_decoder(other, torch.float32, CPU)
    assert LightDecoder.load(other, torch.float32, CPU, normalised=True).normalised
    other.rename(light_file)


def test_half_precision_files_are_loaded_in_the_dtype_asked_for(light_state: State, tmp_path: Path) -> None:
    path = tmp_path / "taew2_1.safetensors"
    save_file({name: tensor.half() for name, tensor in light_state.items()}, path)
    light = LightDecoder.load(path, torch.bfloat16, CPU)
    assert light.dtype == torch.bfloat16
    frames = _decoder(light, dtype=torch.uint8).stream().decode(_latents(4)).float()
    expected = plain_taehv(light_state, _latents(4)) * 255
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


def test_an_engine_shows_its_frames(light_file: Path, checkpoint: Path, face: np.ndarray) -> None:
    config = EngineConfig(devices="cpu", size="64x64")
    chunks = []
    for vae in (light_file, None):
        engine = Engine.from_pretrained(checkpoint, config=config, vae=vae)
        chunks.append(list(engine.generate(face, speech(1.0), seed=1)))
    ours, wan = chunks
    assert [chunk.frames.shape for chunk in ours] == [chunk.frames.shape for chunk in wan]
    assert [chunk.start_column for chunk in ours] == [chunk.start_column for chunk in wan]
    assert not any(np.array_equal(one.frames, other.frames) for one, other in zip(ours, wan, strict=True))
    with pytest.raises(CheckpointError, match="no such file"):
        Engine.from_pretrained(checkpoint, config=config, vae=light_file.with_name("taew2_1-absent.pth"))


def test_the_benchmark_gives_it_a_row(light_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "vae.json"
    point = ["--preset", "tiny", "--size", "64x64", "--device", "cpu", "--blocks", "2", "--warmup", "1"]
    assert main(["vae", *point, "--vae", str(light_file), "--json", str(target)]) == 0
    (run,) = json.loads(target.read_text())["runs"]
    assert run["figures"]["light_decode_ms_p50"]["value"] > 0
    assert run["figures"]["light_psnr_db"]["value"] < 40, "random weights show something else"
    assert len(run["series"]["light_decode_ms"]["values"]) == 2
    assert any(light_file.name in stage["name"] for stage in run["stages"])
