"""Inspecting checkpoints, whole and damaged, and predicting the memory that they need."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import CPU

from liveavatar_engine.config import EngineConfig, ModelConfig, Size
from liveavatar_engine.errors import CheckpointError, ConfigError
from liveavatar_engine.weights.conversion import Conversion
from liveavatar_engine.weights.convert import convert_checkpoint
from liveavatar_engine.weights.create import create_checkpoint
from liveavatar_engine.weights.network import load_network
from liveavatar_engine.weights.presets import PRESETS
from liveavatar_engine.weights.report import CheckpointReport, WrongShape, inspect_checkpoint

NETWORK = "diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
AUDIO_ENCODER = "wav2vec2-large-xlsr-53-english"
PARTS = ["config", "network", "VAE", "text encoder", "tokenizer", "audio encoder"]
ON_CPU = EngineConfig(size="64x64", devices="cpu")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """The golden checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def _inspect(folder: Path, **settings) -> CheckpointReport:
    return inspect_checkpoint(folder, config=dataclasses.replace(ON_CPU, **settings))


def _bad_parts(report: CheckpointReport) -> list[str]:
    return [part.name for part in report.parts if not part.ok]


def _edit(folder: Path, change: Callable[[dict], object]) -> None:
    state = load_file(folder / NETWORK)
    change(state)
    save_file(state, folder / NETWORK)


def _edit_config(folder: Path, **settings) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def test_a_complete_checkpoint(checkpoint: Path) -> None:
    report = _inspect(checkpoint)
    assert report.ok
    assert [part.name for part in report.parts] == PARTS
    assert all(part.present and part.ok for part in report.parts)
    assert not report.mismatch
    network = report["network"]
    state = load_file(checkpoint / NETWORK)
    assert network.files == {NETWORK: (checkpoint / NETWORK).stat().st_size}
    assert set(network.tensors) == set(state)
    assert network.parameters == sum(tensor.numel() for tensor in state.values())
    assert network.dtypes == {"float32": network.parameters}
    assert sum(part.bytes for part in report.parts) == sum(
        p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()
    )


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("config.json", "config"),
        (NETWORK, "network"),
        ("Wan2.1_VAE.pth", "VAE"),
        (TEXT_ENCODER, "text encoder"),
        ("google/umt5-xxl/spiece.model", "tokenizer"),
        (f"{AUDIO_ENCODER}/preprocessor_config.json", "audio encoder"),
        (f"{AUDIO_ENCODER}/model.safetensors", "audio encoder"),
    ],
)
def test_a_missing_file_spoils_its_part_only(copy: Path, path: str, part: str) -> None:
    (copy / path).unlink()
    report = _inspect(copy)
    assert not report.ok
    assert _bad_parts(report) == [part]
    assert Path(path).stem in " ".join(report[part].problems)
    assert (report.memory is None) == (part == "config")


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (NETWORK, "network"),
        ("Wan2.1_VAE.pth", "VAE"),
        (TEXT_ENCODER, "text encoder"),
        ("google/umt5-xxl/spiece.model", "tokenizer"),
        (f"{AUDIO_ENCODER}/model.safetensors", "audio encoder"),
        (f"{AUDIO_ENCODER}/config.json", "audio encoder"),
        ("config.json", "config"),
    ],
)
def test_a_truncated_file_spoils_its_part_only(copy: Path, path: str, part: str) -> None:
    content = (copy / path).read_bytes()
    (copy / path).write_bytes(content[: len(content) // 2])
    report = _inspect(copy)
    assert not report.ok
    assert _bad_parts(report) == [part]
    assert len(report[part].problems) == 1


def test_an_empty_folder(tmp_path: Path) -> None:
    report = _inspect(tmp_path)
    assert _bad_parts(report) == PARTS
    assert not any(part.present for part in report.parts)
    assert (report.model, report.mismatch, report.geometry, report.memory) == (None, None, None, None)


def test_not_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        _inspect(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a directory"):
        _inspect(checkpoint / "config.json")


def test_tensors_that_do_not_fit_are_named(copy: Path) -> None:
    def change(state: dict) -> None:
        state["extra.weight"] = torch.zeros(2)
        del state["head.modulation"]
        state["patch_embedding.bias"] = torch.zeros(3)

    _edit(copy, change)
    report = _inspect(copy)
    assert not report.ok
    assert report["network"].ok
    assert report.model is not None
    assert report.mismatch is not None
    assert report.mismatch.missing == ("head.modulation",)
    assert report.mismatch.unexpected == ("extra.weight",)
    assert report.mismatch.misshapen == (WrongShape("patch_embedding.bias", (3,), (report.model.dim,)),)


def test_the_other_shards_are_read_beside_a_truncated_one(tmp_path: Path) -> None:
    create_checkpoint(tmp_path / "sharded", dataclasses.replace(PRESETS["tiny"], shard_bytes=800_000))
    first, *others = sorted((tmp_path / "sharded").glob("diffusion*-of-*.safetensors"))
    assert len(others) >= 2
    tensors = _inspect(tmp_path / "sharded")["network"].tensors
    lost = {name for name, info in tensors.items() if info.shard == first}
    first.write_bytes(first.read_bytes()[:-1])
    report = _inspect(tmp_path / "sharded")
    assert _bad_parts(report) == ["network"]
    assert [problem.partition(":")[0] for problem in report["network"].problems] == [str(first)]
    assert len(report["network"].files) == len(others) + 2
    assert report.mismatch is not None
    assert set(report.mismatch.missing) == lost


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    create_checkpoint(tmp_path / "sharded", dataclasses.replace(PRESETS["tiny"], shard_bytes=800_000))
    gone = sorted((tmp_path / "sharded").glob("diffusion*-of-*.safetensors"))[1]
    gone.unlink()
    (problem,) = _inspect(tmp_path / "sharded")["network"].problems
    assert gone.name in problem


def test_parts_that_were_made_for_another_network(copy: Path) -> None:
    model = ModelConfig.from_file(copy / "config.json")
    _edit_config(copy, audio_dim=model.audio_dim + 16, text_dim=model.text_dim + 8)
    report = _inspect(copy)
    assert _bad_parts(report) == ["text encoder", "audio encoder"]
    assert (
        report["audio encoder"]
        .problems[0]
        .endswith(f"25 states of {model.audio_dim}; the network was made for 25 of {model.audio_dim + 16}")
    )
    assert (
        report["text encoder"]
        .problems[0]
        .endswith(f"states of {model.text_dim}; the network was made for {model.text_dim + 8}")
    )
    assert report.mismatch is not None
    assert "text_embedding.0.weight" in {wrong.name for wrong in report.mismatch.misshapen}


def test_an_area_is_taken_for_a_wide_picture(checkpoint: Path) -> None:
    area, exact = (inspect_checkpoint(checkpoint, Size.parse(text), ON_CPU) for text in ("720*400", "720x400"))
    assert area.geometry is not None
    assert exact.geometry is not None
    assert (area.geometry.width, area.geometry.height) == (704, 384)
    assert (exact.geometry.width, exact.geometry.height) == (720, 400)


def test_an_impossible_size_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="width 72"):
        inspect_checkpoint(checkpoint, Size(72, 64, exact=True), ON_CPU)


def test_parts_that_are_not_there_need_no_memory(copy: Path) -> None:
    (copy / "Wan2.1_VAE.pth").unlink()
    (copy / TEXT_ENCODER).unlink()
    memory = _inspect(copy).memory
    assert memory is not None
    assert not {"VAE", "VAE buffers"} & {row.name for row in memory.rows}
    assert memory["text encoder"] == 0


# --- converted checkpoints


@pytest.fixture(scope="module")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "fp8"
    convert_checkpoint(checkpoint, folder, fp8_skip=("ffn", "head"), shard_bytes=200_000)
    return folder


def test_a_converted_checkpoint(converted: Path) -> None:
    report = _inspect(converted)
    assert report.ok
    assert report.conversion == Conversion("fp8", ("ffn", "head"))
    assert not report.mismatch
    assert report["network"].dtypes.keys() == {"float8_e4m3fn", "bfloat16", "float32"}
    network = load_network(converted, None, torch.bfloat16, CPU, fp8_skip=("ffn", "head"))
    assert report.memory is not None
    assert report.memory["network"] == sum(parameter.nbytes for parameter in network.parameters())


def test_a_converted_checkpoint_at_another_precision_is_an_error(converted: Path) -> None:
    with pytest.raises(ConfigError, match="the precision must be fp8 or auto"):
        _inspect(converted, precision="bf16")
    with pytest.raises(ConfigError, match="converted with fp8_skip ffn,head, not ffn"):
        _inspect(converted, fp8_skip=("ffn",))


@pytest.mark.parametrize(("version", "part"), [(None, "network"), (99, "config")], ids=["no note", "newer"])
def test_a_converted_checkpoint_whose_note_is_spoilt(
    version: int | None, part: str, converted: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(converted, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["liveavatar_engine"] = None if version is None else {**config["liveavatar_engine"], "version": version}
    (copy / "config.json").write_text(json.dumps(config))
    report = _inspect(copy)
    assert not report.ok
    assert part in _bad_parts(report)
    assert report.conversion is None


def test_weights_in_fp8_from_elsewhere_are_named(copy: Path) -> None:
    name = "blocks.0.ffn.0.weight"
    _edit(copy, lambda state: state.update({name: state[name].to(torch.float8_e4m3fn)}))
    (problem,) = _inspect(copy)["network"].problems
    assert f"{name} is F8_E4M3" in problem
