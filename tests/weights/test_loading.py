"""Loading a network: every tensor accounted for before anything is allocated; adapters; damage."""

import json
import os
import pickle
import resource
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import CPU, GOLDEN

from liveavatar_engine.conditions.audio_encoder import AudioEncoder
from liveavatar_engine.conditions.text import TextEncoder
from liveavatar_engine.errors import CheckpointError
from liveavatar_engine.vae.vae import load_vae
from liveavatar_engine.weights import network as network_module
from liveavatar_engine.weights.layout import Checkpoint
from liveavatar_engine.weights.network import load_network
from liveavatar_engine.weights.tensors import TensorStore, read_pickle

NETWORK = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """The golden checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def _edit(folder: Path, change) -> None:
    state = load_file(folder / NETWORK)
    change(state)
    save_file(state, folder / NETWORK)


def _shard(folder: Path, shards: int) -> dict[str, str]:
    """Split the network's file into shards with an index, as the published checkpoint has them."""
    state = load_file(folder / NETWORK)
    (folder / NETWORK).unlink()
    weight_map = {}
    for number in range(shards):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(state.items())[number::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{NETWORK}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def _load(folder: Path, lora: Path | None = None):
    return load_network(folder, lora, torch.float32, CPU)


def test_shards_give_the_same_network(copy: Path, network) -> None:
    _shard(copy, 3)
    seen: list[tuple[int, int]] = []
    sharded = load_network(copy, None, torch.float32, CPU, lambda done, total: seen.append((done, total))).state_dict()
    assert seen == [(done, len(sharded)) for done in range(1, len(sharded) + 1)]
    assert all(sharded[name].equal(tensor) for name, tensor in network.state_dict().items())


def test_one_shard_is_open_at_a_time(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _shard(copy, 3)
    store = TensorStore.of_model(copy, "diffusion_pytorch_model")
    from liveavatar_engine.weights import tensors

    opened: list[weakref.ref] = []
    most = 0
    real = tensors._open

    class Shard:
        def __init__(self, path: Path) -> None:
            self._file = real(path)

        def __enter__(self):
            return self._file.__enter__()

        def __exit__(self, *exception):
            return self._file.__exit__(*exception)

    def watched(path: Path):
        shard = Shard(path)
        opened.append(weakref.ref(shard))
        return shard

    monkeypatch.setattr(tensors, "_open", watched)
    for _ in store:
        most = max(most, sum(reference() is not None for reference in opened))
    assert len(opened) == 3
    assert most == 1


def test_precision_and_float32_parts(checkpoint: Path) -> None:
    low = load_network(checkpoint, None, torch.bfloat16, CPU)
    dtypes = {name: tensor.dtype for name, tensor in low.state_dict().items()}
    assert dtypes["blocks.0.self_attn.q.weight"] == torch.bfloat16
    assert dtypes["text_embedding.0.weight"] == torch.bfloat16
    for name in ("time_embedding.0.weight", "head.head.weight", "blocks.1.modulation", "casual_audio_encoder.weights"):
        assert dtypes[name] == torch.float32, name


def test_all_misfits_are_listed_in_one_error_before_allocation(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(state) -> None:
        del state["blocks.1.ffn.0.bias"], state["head.modulation"]
        state["blocks.9.extra.weight"] = torch.zeros(1)
        state["patch_embedding.bias"] = torch.zeros(7)

    _edit(copy, change)
    monkeypatch.setattr(network_module, "assign", lambda *_: pytest.fail("a tensor was placed"))
    with pytest.raises(CheckpointError) as error:
        _load(copy)
    message = str(error.value)
    assert "2 missing: blocks.1.ffn.0.bias, head.modulation" in message
    assert "1 unexpected: blocks.9.extra.weight" in message
    assert "patch_embedding.bias is [7], expected [64]" in message


@pytest.mark.parametrize("size", [0, 100, -1000], ids=["empty", "only a header's start", "cut off"])
def test_truncated_files_are_named(copy: Path, size: int) -> None:
    path = copy / NETWORK
    os.truncate(path, size % path.stat().st_size)
    with pytest.raises(CheckpointError, match=rf"{NETWORK}: damaged, truncated or not a safetensors file"):
        _load(copy)


def test_garbage_is_named(copy: Path) -> None:
    (copy / NETWORK).write_bytes(os.urandom(5000))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        _load(copy)


def test_index_without_its_shards(copy: Path) -> None:
    weight_map = _shard(copy, 2)
    (copy / sorted(set(weight_map.values()))[1]).unlink()
    with pytest.raises(CheckpointError, match="names shards that are not there: diffusion_pytorch_model-00002"):
        _load(copy)


def test_a_tensor_in_two_shards(copy: Path) -> None:
    state = load_file(copy / NETWORK)
    save_file({"head.head.bias": state["head.head.bias"]}, copy / "diffusion_pytorch_model_more.safetensors")
    with pytest.raises(CheckpointError, match="head.head.bias also stands in"):
        _load(copy)


def test_broken_index(copy: Path) -> None:
    (copy / f"{NETWORK}.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a shard index"):
        _load(copy)


# --- adapters


def _adapter(tmp_path: Path, change, metadata: dict[str, str] | None = None) -> Path:
    state = load_file(GOLDEN / "lora_plain_names.safetensors")
    change(state)
    save_file(state, tmp_path / "adapter.safetensors", metadata)
    return tmp_path / "adapter.safetensors"


def test_alpha_over_rank_defaults_to_one_half(checkpoint: Path, tmp_path: Path, network) -> None:
    name = "blocks.0.self_attn.q.weight"
    half, full = (
        _load(checkpoint, _adapter(tmp_path, lambda s: None, metadata)).state_dict()[name]
        for metadata in (None, {"alpha": "4"})
    )
    plain = network.state_dict()[name]
    assert torch.allclose(full - plain, 2 * (half - plain), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"blocks.77.self_attn.q.lora_A.weight": torch.zeros(4, 64),
                                "blocks.77.self_attn.q.lora_B.weight": torch.zeros(64, 4)}),
            "a LoRA for another model: blocks.77.self_attn.q.weight is not a weight of this model",
        ),
        (
            lambda s: s.update({"blocks.0.self_attn.q.lora_B.weight": torch.zeros(63, 4)}),
            r"blocks.0.self_attn.q.weight: B \[63, 4\] A \[4, 64\] do not make \[64, 64\]",
        ),
        (lambda s: s.pop("blocks.0.self_attn.q.lora_B.weight"), "blocks.0.self_attn.q.weight has no counterpart"),
        (lambda s: s.update({"blocks.0.self_attn.q.weight": torch.zeros(2)}), "not a LoRA adapter, found blocks.0.se"),
        (lambda s: s.clear(), "not a LoRA adapter, found no tensors at all"),
    ],
    ids=["unknown weight", "wrong shape", "half a pair", "full weights", "empty"],
)  # fmt: skip
def test_adapters_that_do_not_fit(checkpoint: Path, tmp_path: Path, change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _load(checkpoint, _adapter(tmp_path, change))


def test_missing_adapter(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file"):
        _load(checkpoint, tmp_path / "none.safetensors")


# --- the parts around the network


class Intruder:
    """A pickle that would create a file if it were run."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self):
        return (Path.touch, (self._marker,))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickles_cannot_run_code(tmp_path: Path, writer: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    payload = {"conv1.weight": torch.zeros(1), "evil": Intruder(marker)}
    if writer == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    for load in (read_pickle, lambda p: load_vae(p, torch.float32, CPU)):
        with pytest.raises(CheckpointError, match=r"evil\.pth: not a PyTorch file of plain tensors.*refused"):
            load(path)
    assert not marker.exists()


def test_vae_and_text_encoder_of_other_models(copy: Path) -> None:
    files = Checkpoint(copy)
    vae = torch.load(files.vae, weights_only=True)
    del vae["decoder.head.2.bias"]
    torch.save(vae, files.vae)
    with pytest.raises(CheckpointError, match=r"Wan2.1_VAE.pth: .*\n.*1 missing: decoder.head.2.bias"):
        load_vae(files.vae, torch.float32, CPU)
    torch.save({"a": torch.zeros(3)}, files.vae)
    with pytest.raises(CheckpointError, match=r"Wan2.1_VAE.pth: not the tensors of a Wan 2.1 VAE"):
        load_vae(files.vae, torch.float32, CPU)
    with pytest.raises(CheckpointError, match="not the tensors of Wan's UMT5 encoder"):
        TextEncoder.load(files.vae, files.tokenizer, torch.float32, CPU)


def test_truncated_pickle(copy: Path) -> None:
    files = Checkpoint(copy)
    os.truncate(files.text_encoder, 5000)
    with pytest.raises(CheckpointError, match="umt5-xxl-enc-bf16.pth: not a PyTorch file"):
        TextEncoder.load(files.text_encoder, files.tokenizer, torch.float32, CPU)


def test_missing_parts_are_named_at_once(copy: Path) -> None:
    shutil.rmtree(copy / "google")
    (copy / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)it lacks\n  Wan2.1_VAE.pth.*\n  google/umt5-xxl/ \(tokenizer"):
        Checkpoint(copy)
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint(copy / "nowhere")
    with pytest.raises(CheckpointError, match="is a file, not a directory"):
        Checkpoint(copy / "config.json")


def test_broken_tokenizer(copy: Path) -> None:
    files = Checkpoint(copy)
    (files.tokenizer / "spiece.model").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="umt5-xxl: not a usable tokenizer"):
        TextEncoder.load(files.text_encoder, files.tokenizer, torch.float32, CPU)


def test_audio_encoder_without_a_tensor(copy: Path) -> None:
    folder = Checkpoint(copy).audio_encoder
    state = load_file(folder / "model.safetensors")
    del state["wav2vec2.encoder.layers.3.attention.q_proj.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing or of another shape: .*layers.3.attention.q_proj.weight"):
        AudioEncoder.load(folder, CPU)


def test_audio_encoder_of_another_rate(copy: Path) -> None:
    settings = Checkpoint(copy).audio_encoder / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("16000", "8000"))
    with pytest.raises(CheckpointError, match="sampling rate 8000, expected 16000"):
        AudioEncoder.load(settings.parent, CPU)


def test_loading_needs_little_more_than_the_network(tmp_path: Path) -> None:
    """Peak memory while a sharded file is read stays near one copy of its tensors."""
    for number in range(8):
        shard = tmp_path / f"diffusion_pytorch_model-{number}.safetensors"
        save_file({f"t{number}": torch.ones(8 << 20)}, shard)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _, tensor in TensorStore.of_model(tmp_path, "diffusion_pytorch_model"):
        tensor.sum()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert peak < 3 * 32, f"{peak:.0f} MB for shards of 32 MB"
