"""Converted checkpoints: the same bits as converting while loading, complete, and nothing half-written."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peak_memory import PeakMemory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import CPU, GOLDEN, bits, speech

from liveavatar_engine import Engine, EngineConfig
from liveavatar_engine.config.engine import REFERENCE_FP8_SKIP
from liveavatar_engine.errors import CheckpointError, ConfigError, OutputError
from liveavatar_engine.model import Network
from liveavatar_engine.weights import tensors
from liveavatar_engine.weights.conversion import Conversion, settled
from liveavatar_engine.weights.convert import convert_checkpoint
from liveavatar_engine.weights.create import create_checkpoint
from liveavatar_engine.weights.network import load_network
from liveavatar_engine.weights.presets import PRESETS
from liveavatar_engine.weights.staging import staged
from liveavatar_engine.weights.tensors import TensorStore

NETWORK = "diffusion_pytorch_model.safetensors"
LORA = GOLDEN / "lora.safetensors"


@pytest.fixture(scope="module")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint with its LoRA, in FP8."""
    folder = tmp_path_factory.mktemp("converted") / "fp8"
    convert_checkpoint(checkpoint, folder, lora=LORA)
    return folder


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    """The converted checkpoint, to be damaged."""
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _same(one: Network, other: Network) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and bits(tensor).equal(bits(others[name])) for name, tensor in mine.items()
    )


@pytest.mark.parametrize("skip", [REFERENCE_FP8_SKIP, (), ("self_attn.k", "ffn.2")], ids=["reference", "none", "some"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
def test_the_same_bits_as_quantising_while_loading(
    lora: Path | None, skip: tuple[str, ...], checkpoint: Path, tmp_path: Path
) -> None:
    convert_checkpoint(checkpoint, tmp_path / "fp8", lora=lora, fp8_skip=skip, shard_bytes=100_000)
    assert len(list((tmp_path / "fp8").glob("*.safetensors"))) > 3
    loaded = load_network(tmp_path / "fp8", None, torch.bfloat16, CPU, fp8_skip=skip)
    assert _same(loaded, load_network(checkpoint, lora, torch.bfloat16, CPU, fp8_skip=skip))


def test_the_same_bits_in_bf16(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "bf16", lora=LORA, precision="bf16")
    loaded = load_network(tmp_path / "bf16", None, torch.bfloat16, CPU)
    assert _same(loaded, load_network(checkpoint, LORA, torch.bfloat16, CPU))


def test_tensors_keep_the_references_names(converted: Path, checkpoint: Path) -> None:
    original, state = load_file(checkpoint / NETWORK), load_file(converted / NETWORK)
    scales = {name for name in state if name.endswith(".weight_scale")}
    assert state.keys() - scales == original.keys()
    quantized = {name.removesuffix("_scale") for name in scales}
    assert {"blocks.0.self_attn.q.weight", "blocks.1.ffn.2.weight"} <= quantized
    assert "head.head.weight" not in quantized
    for name, tensor in original.items():
        assert state[name].shape == tensor.shape
        wide = Network.keeps_float32(name)
        expected = torch.float8_e4m3fn if name in quantized else torch.float32 if wide else torch.bfloat16
        assert state[name].dtype == expected, name
    for name in quantized:
        assert (state[f"{name}_scale"].shape, state[f"{name}_scale"].dtype) == (original[name].shape[:1], torch.float32)


def test_other_parts_are_the_same_files(converted: Path, checkpoint: Path) -> None:
    ours, theirs = _files(converted), _files(checkpoint)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {NETWORK, "config.json"}


def test_what_it_is_is_noted_down(converted: Path, checkpoint: Path) -> None:
    note = json.loads((converted / "config.json").read_text())["liveavatar_engine"]
    assert (note["format"], note["version"], note["precision"]) == ("converted checkpoint", 1, "fp8")
    assert tuple(note["fp8_skip"]) == REFERENCE_FP8_SKIP
    sha256 = hashlib.sha256(LORA.read_bytes()).hexdigest()
    assert note["lora"] == {"file": "lora.safetensors", "sha256": sha256, "scale": 0.5}
    with safe_open(converted / NETWORK, framework="pt") as file:
        assert json.loads(file.metadata()["liveavatar_engine"]) == note
    conversion = Conversion.of(converted)
    assert conversion is not None
    assert str(conversion).endswith(f", lora.safetensors merged (sha256 {sha256[:12]})")
    assert Conversion.of(checkpoint) is None


def test_links_share_the_files(checkpoint: Path, tmp_path: Path) -> None:
    original = Path(shutil.copytree(checkpoint, tmp_path / "original"))
    (original / "Wan2.1_VAE.pth").rename(tmp_path / "vae.pth")
    (original / "Wan2.1_VAE.pth").symlink_to("../vae.pth")  # as in a download cache
    convert_checkpoint(original, tmp_path / "fp8", link=True)
    assert (tmp_path / "fp8" / "Wan2.1_VAE.pth").samefile(tmp_path / "vae.pth")
    assert not (tmp_path / "fp8" / "Wan2.1_VAE.pth").is_symlink()
    assert (tmp_path / "fp8" / "google/umt5-xxl/spiece.model").stat().st_nlink == 2
    assert (original / NETWORK).stat().st_nlink == 1


def test_links_across_file_systems_are_refused(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OutputError, match=r"cannot be hard-linked there \(Invalid cross-device link\); leave linking"):
        convert_checkpoint(checkpoint, tmp_path / "fp8", link=True)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_network(tmp_path: Path, monkeypatch) -> None:
    """Counted while tensors are read through buffers, where none of them is mapped."""

    def read(store: TensorStore, device: torch.device):
        return staged(map(store._extent, store.in_order()), device, piece=3001, buffers=3, threads=2)

    monkeypatch.setattr(TensorStore, "read", read)
    monkeypatch.setattr(tensors, "_HOST_PIECE", 20_000)
    deep = dataclasses.replace(PRESETS["tiny"], model=dataclasses.replace(PRESETS["tiny"].model, num_layers=60))
    create_checkpoint(tmp_path / "deep", deep)
    sizes = [tensor.nbytes for tensor in load_file(tmp_path / "deep" / NETWORK).values()]
    with PeakMemory("cpu") as memory:
        convert_checkpoint(tmp_path / "deep", tmp_path / "fp8")
    assert memory.peak < 4 * max(sizes) < 0.35 * sum(sizes), "two tensors as they are stored and as they are written"


def test_progress_counts_the_bytes(checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    convert_checkpoint(checkpoint, tmp_path / "fp8", progress=lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert {total for _, _, total in calls} == {done[-1]}
    size = sum(len(content) for content in _files(tmp_path / "fp8").values())
    assert done[-1] <= size <= done[-1] + 100_000
    assert {call[0] for call in calls} >= {NETWORK, "Wan2.1_VAE.pth"}


# --- in an engine


def _engine(folder: Path, lora: Path | None = None, **settings) -> Engine:
    return Engine.from_pretrained(folder, lora, config=EngineConfig(size="64x64", devices="cpu", **settings))


def test_an_engine_makes_the_same_frames(converted: Path, checkpoint: Path, face: np.ndarray) -> None:
    def frames(engine: Engine) -> np.ndarray:
        return next(iter(engine.generate(face, speech(0.5), "hello", max_blocks=1))).frames

    engine = _engine(converted)
    assert (engine.config.precision, engine.config.fp8_skip) == ("fp8", REFERENCE_FP8_SKIP)
    assert np.array_equal(frames(engine), frames(_engine(checkpoint, LORA, precision="fp8")))


def test_the_list_it_was_converted_with_is_the_default(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "fp8", fp8_skip=("ffn", "cross_attn"))
    for settings in ({}, {"precision": "fp8"}, {"fp8_skip": ("cross_attn", "ffn")}):
        config = settled(EngineConfig(devices="cpu", **settings), tmp_path / "fp8", None)
        assert (config.precision, config.fp8_skip) == ("fp8", ("ffn", "cross_attn"))


def test_a_checkpoint_in_bf16_leaves_the_precision_open(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "plain", precision="bf16")
    for precision in ("auto", "fp32", "bf16", "fp8"):
        config = EngineConfig(devices="cpu", precision=precision)
        assert settled(config, tmp_path / "plain", LORA) == config, "no adapter is merged into it yet"
    convert_checkpoint(checkpoint, tmp_path / "merged", precision="bf16", lora=LORA)
    with pytest.raises(ConfigError, match=r"merged: lora.safetensors is merged into it already"):
        settled(EngineConfig(), tmp_path / "merged", LORA)


CONTRADICTIONS = {
    "lora": ({}, LORA, "lora.safetensors is merged into it already; load it without a LoRA"),
    "bf16": ({"precision": "bf16"}, None, "converted to fp8: the precision must be fp8 or auto"),
    "fp32": ({"precision": "fp32"}, None, "converted to fp8: the precision must be fp8 or auto"),
    "skip": ({"fp8_skip": ["ffn"]}, None, "converted with fp8_skip text_embedding,.*, not ffn; leave it out"),
    "no skip": ({"precision": "fp8", "fp8_skip": []}, None, "converted with fp8_skip text_embedding,.*, not none"),
    "cache": ({"kv_precision": "fp32"}, None, "kv_precision with precision fp8 must be auto, bf16 or fp8"),
}


@pytest.mark.parametrize(("settings", "lora", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_one_error(settings: dict, lora: Path | None, message: str, converted: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        _engine(converted, lora, **settings)


def test_no_lora_goes_into_fp8(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "fp8")
    with pytest.raises(ConfigError, match="converted to fp8, which no LoRA can be merged into .*; convert again"):
        _engine(tmp_path / "fp8", LORA)


# --- what cannot be converted or loaded


def test_a_converted_checkpoint_is_not_converted_again(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fp8: converted to fp8, all .*; convert the original instead"):
        convert_checkpoint(converted, tmp_path / "again")
    assert list(tmp_path.iterdir()) == []


def _damage(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with safe_open(folder / NETWORK, framework="pt") as file:
            metadata = file.metadata()
        state = load_file(folder / NETWORK)
        change(state)
        save_file(state, folder / NETWORK, metadata)

    return damage


def _note(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["liveavatar_engine"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def _forget(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["liveavatar_engine"]
    (folder / "config.json").write_text(json.dumps(config))


SCALE, WEIGHT = "blocks.0.ffn.0.weight_scale", "blocks.0.ffn.0.weight"
DAMAGED = {
    "no scale": (_damage(lambda state: state.pop(SCALE)), f"1 missing: {SCALE}"),
    "wide": (_damage(lambda state: state.update({WEIGHT: state[WEIGHT].float()})), f"{WEIGHT} is F32"),
    "note": (_note(fp8_skip=None), "not a note of how the checkpoint was converted"),
    "lora": (_note(lora={"name": "x"}), "not a note of how the checkpoint was converted"),
    "version": (_note(version=2), "converted checkpoint 2 in fp8; this version reads converted checkpoint 1"),
    "precision": (_note(precision="int3"), "converted checkpoint 1 in int3; this version reads .* in bf16 or fp8"),
    "list": (_note(fp8_skip=["ffn"]), "config.json and the shards .* are not of the same conversion"),
    "no note": (_forget, "config.json and the shards .* are not of the same conversion"),
    "cut off": (
        lambda folder: os.truncate(folder / NETWORK, (folder / NETWORK).stat().st_size - 7),
        f"{NETWORK}: damaged, truncated or not a safetensors file",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named(damage: Callable[[Path], None], message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        _engine(copy)


def _incomplete(folder: Path) -> dict:
    (folder / "Wan2.1_VAE.pth").unlink()
    return {}


def _cut_off(folder: Path) -> dict:
    os.truncate(folder / NETWORK, (folder / NETWORK).stat().st_size - 7)
    return {}


BAD_SOURCES = {
    "incomplete": (_incomplete, CheckpointError, "it lacks\n  Wan2.1_VAE.pth"),
    "cut off": (_cut_off, CheckpointError, "damaged, truncated or not a safetensors file"),
    "adapter": (lambda folder: {"lora": folder / NETWORK}, CheckpointError, "not a LoRA adapter"),
    "skip": (lambda _: {"fp8_skip": ("fnn",)}, ConfigError, "no linear layer's name contains 'fnn'"),
    "skip in bf16": (lambda _: {"precision": "bf16", "fp8_skip": ("ffn",)}, ConfigError, "no meaning with precision"),
    "precision": (lambda _: {"precision": "int3"}, ConfigError, "precision must be one of bf16, fp8, not 'int3'"),
    "shards": (lambda _: {"shard_bytes": 0}, ConfigError, "at least one byte"),
}


@pytest.mark.parametrize(("prepare", "error", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_bad_sources_leave_nothing(prepare, error, message: str, checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    settings = prepare(source)
    with pytest.raises(error, match=message):
        convert_checkpoint(source, tmp_path / "fp8", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _interrupt(file: str, done: int, total: int) -> None:
    if file == NETWORK:
        raise KeyboardInterrupt


def _fill_the_disk(file: str, done: int, total: int) -> None:
    if file == NETWORK:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("stop", "error"), [(_interrupt, KeyboardInterrupt), (_fill_the_disk, OutputError)], ids=["interrupt", "full disk"]
)
def test_an_end_under_way_leaves_nothing(stop, error, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(error):
        convert_checkpoint(checkpoint, tmp_path / "fp8", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk_is_refused_at_once(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    monkeypatch.setattr(TensorStore, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(OutputError, match=r"fp8: needs \d\.\d+ GB, the disk has 0\.001 GB free"):
        convert_checkpoint(checkpoint, tmp_path / "fp8")
    assert list(tmp_path.iterdir()) == []


def test_only_a_new_or_empty_folder_is_filled(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        convert_checkpoint(checkpoint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
