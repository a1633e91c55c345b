"""Inspecting checkpoints, whole and damaged, and predicting the memory that they need."""

import dataclasses
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from liveavatar_kernels.cache import KeyValueCache
from liveavatar_kernels.e4m3 import E4M3
from safetensors.torch import load_file, save_file
from support import CPU
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liveavatar_engine.config import EngineConfig, ModelConfig, Size, StreamGeometry
from liveavatar_engine.config.engine import REFERENCE_FP8_SKIP
from liveavatar_engine.denoise.caches import CacheArena
from liveavatar_engine.denoise.positions import StreamPositions
from liveavatar_engine.errors import CheckpointError, ConfigError
from liveavatar_engine.model.network import BlockInputs, Network
from liveavatar_engine.model.quantize import quantize_linears
from liveavatar_engine.pipeline.device import Precision
from liveavatar_engine.vae.layers import History
from liveavatar_engine.vae.vae import Vae, load_vae
from liveavatar_engine.weights.create import create_checkpoint
from liveavatar_engine.weights.memory import MemoryEstimate, predict_memory
from liveavatar_engine.weights.network import empty_network, load_network
from liveavatar_engine.weights.presets import PRESETS, Preset
from liveavatar_engine.weights.report import CheckpointReport, WrongShape, inspect_checkpoint

NETWORK = "diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
AUDIO_ENCODER = "wav2vec2-large-xlsr-53-english"
PARTS = ["config", "network", "VAE", "text encoder", "tokenizer", "audio encoder"]
META = torch.device("meta")
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


@pytest.mark.parametrize(
    ("precision", "kv_precision", "dtype"),
    [
        ("fp32", "auto", torch.float32),
        ("bf16", "auto", torch.bfloat16),
        ("fp8", "auto", torch.bfloat16),
        ("bf16", "fp8", torch.bfloat16),
    ],
)
def test_weights_and_caches_are_predicted_to_the_byte(
    checkpoint: Path, precision: str, kv_precision: str, dtype: torch.dtype
) -> None:
    report = _inspect(checkpoint, precision=precision, kv_precision=kv_precision, steps=3, max_sessions=2)
    memory, geometry = report.memory, report.geometry
    assert memory is not None
    assert geometry is not None
    caches = CacheArena(geometry, 3, 2, E4M3 if kv_precision == "fp8" else dtype, CPU).caches(0)
    assert memory["rings"] == sum(_nbytes(layer) for step in caches.rings for layer in step)
    assert memory["sink"] == sum(_nbytes(layer) for layer in caches.sink)
    network = load_network(checkpoint, None, dtype, CPU)
    if precision == "fp8":
        quantize_linears(network, REFERENCE_FP8_SKIP)
    assert memory["network"] == sum(parameter.nbytes for parameter in network.parameters())
    vae = load_vae(checkpoint / "Wan2.1_VAE.pth", dtype, CPU)
    assert memory["VAE"] == sum(parameter.nbytes for parameter in vae.parameters())
    keys = network.text_keys(torch.zeros(1, network.config.text_dim))
    assert memory["text keys"] == 2 * sum(layer.k.nbytes + layer.v.nbytes for layer in keys)
    assert memory["text encoder"] == report["text encoder"].parameters * dtype.itemsize
    assert memory["audio encoder"] == report["audio encoder"].parameters * 4
    assert memory.total == sum(row.bytes for row in memory.rows)


def _nbytes(cache: KeyValueCache) -> int:
    return sum(tensor.nbytes for tensor in (cache.k, cache.v, cache.k_scale, cache.v_scale) if tensor is not None)


def test_parts_that_are_not_there_need_no_memory(copy: Path) -> None:
    (copy / "Wan2.1_VAE.pth").unlink()
    (copy / TEXT_ENCODER).unlink()
    memory = _inspect(copy).memory
    assert memory is not None
    assert not {"VAE", "VAE history"} & {row.name for row in memory.rows}
    assert memory["text encoder"] == 0


class PeakMemory(TorchDispatchMode):
    """Most bytes alive at once of what was made in the `with` body; works without any memory, on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in inputs | self._known:
                self._allocate(tensor.untyped_storage())
        return outputs

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        self._known.add(storage._cdata)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.live -= count


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _predict(preset: Preset, height: int, width: int, dtype: torch.dtype, vae: bool = True) -> MemoryEstimate:
    geometry = StreamGeometry(preset.model, height, width)
    precision = Precision(dtype, dtype, fp8_skip=None)
    return predict_memory(geometry, preset.vae if vae else None, precision=precision, steps=1, sessions=1)


def _meta_vae(preset: Preset, dtype: torch.dtype) -> Vae:
    with META:
        vae = Vae(preset.vae).eval().requires_grad_(False)
    for part in (vae.decoder, vae.conv2):
        part.to(dtype)
    return vae


@pytest.mark.parametrize(
    ("preset", "height", "width", "dtype"),
    [("tiny", 256, 256, torch.float32), ("small", 384, 704, torch.bfloat16), ("14b", 384, 704, torch.bfloat16)],
)
def test_working_memory_of_a_step_is_near_the_truth(preset: str, height: int, width: int, dtype: torch.dtype) -> None:
    model = PRESETS[preset].model
    geometry = StreamGeometry(model, height, width)
    network = empty_network(model)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if Network.keeps_float32(name) else dtype)
    with torch.inference_mode():
        caches = CacheArena(geometry, 1, 1, dtype, META).caches(0)
        text = network.text_keys(torch.zeros(1, model.text_dim, device=META))
        audio = network.audio_inputs(torch.zeros(1, model.audio_layers, model.audio_dim, 12, device=META))
        time = network.time_modulation(torch.zeros((), device=META))
        view = StreamPositions(geometry, caches, 1, META).block_views(0, [10])[0]
        latents = torch.zeros(geometry.block_shape, device=META)
        with PeakMemory() as memory:
            network(latents, time, text, BlockInputs(None, audio, None), caches.rings[0], caches.sink, view)
    predicted = _predict(PRESETS[preset], height, width, dtype, vae=False)["working memory"]
    assert 0.95 < predicted / memory.peak < 1.2


@pytest.mark.parametrize(("preset", "dtype"), [("tiny", torch.float32), ("14b", torch.bfloat16)])
def test_history_of_the_vae_is_predicted_to_the_byte(preset: str, dtype: torch.dtype) -> None:
    stream = _meta_vae(PRESETS[preset], dtype).decoder_stream()
    for _ in range(2):
        stream.decode(torch.zeros(16, 1, 8, 12, device=META))
    frames = stream._history._frames.values()
    assert _predict(PRESETS[preset], 64, 96, dtype)["VAE history"] == sum(frame.nbytes for frame in frames)


@pytest.mark.parametrize(("preset", "height", "width"), [("small", 256, 256), ("14b", 384, 704)])
def test_working_memory_of_encoding_is_near_the_truth(
    preset: str, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(History, "equals", lambda *_: False)  # there is nothing to compare on the meta device
    vae = _meta_vae(PRESETS[preset], torch.bfloat16)
    with PeakMemory() as memory:
        vae.encode_still(torch.zeros(3, height, width, device=META), 3)
    predicted = _predict(PRESETS[preset], height, width, torch.bfloat16)["working memory"]
    assert 0.95 < predicted / memory.peak < 1.2
