"""Checkpoints with random weights: the reference's layout, a lively video, and nothing half-written."""

import dataclasses
import errno
import json
import os
import resource
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support import speech
from transformers import AutoTokenizer

from liveavatar_engine import Engine, EngineConfig
from liveavatar_engine.conditions.text import load_tokenizer
from liveavatar_engine.config import ModelConfig
from liveavatar_engine.errors import ConfigError, OutputError
from liveavatar_engine.vae.shape import VaeShape
from liveavatar_engine.weights import create
from liveavatar_engine.weights.create import checkpoint_tensors, create_checkpoint
from liveavatar_engine.weights.presets import PRESETS, Preset
from liveavatar_engine.weights.tensors import TensorStore, read_pickle
from liveavatar_engine.weights.tokenizer import END_ID, PAD_ID, UNKNOWN_ID, VOCABULARY, write_tokenizer

TINY = PRESETS["tiny"]
NETWORK = "diffusion_pytorch_model.safetensors"
VAE = "Wan2.1_VAE.pth"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
AUDIO_ENCODER = "wav2vec2-large-xlsr-53-english"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("presets") / "tiny"
    create_checkpoint(folder, TINY)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _layout(path: Path) -> dict[str, tuple]:
    """Name -> shape and dtype of the tensors in a file."""
    if path.suffix == ".pth":
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in read_pickle(path).items()}
    return {name: (info.shape, info.dtype) for name, info in TensorStore([path]).tensors.items()}


@pytest.fixture(scope="module")
def like_golden(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the golden one's sizes."""
    model = ModelConfig.from_file(checkpoint / "config.json")
    vae = VaeShape.of_tensors({name: shape for name, (shape, _) in _layout(checkpoint / VAE).items()})
    text = {name: shape for name, (shape, _) in _layout(checkpoint / TEXT_ENCODER).items()}
    inner, _ = text["blocks.0.attn.q.weight"]
    buckets, heads = text["blocks.0.pos_embedding.embedding.weight"]
    audio = json.loads((checkpoint / AUDIO_ENCODER / "config.json").read_text())
    preset = Preset(
        name="golden",
        model=model,
        vae=vae,
        text=dataclasses.replace(
            TINY.text,
            layers=sum(name.endswith("attn.q.weight") for name in text),
            heads=heads,
            head_dim=inner // heads,
            ffn_dim=text["blocks.0.ffn.fc1.weight"][0],
            buckets=buckets,
        ),
        audio=dataclasses.replace(
            TINY.audio,
            heads=audio["num_attention_heads"],
            ffn_dim=audio["intermediate_size"],
            conv_dim=audio["conv_dim"][0],
            position_kernel=audio["num_conv_pos_embeddings"],
            position_groups=audio["num_conv_pos_embedding_groups"],
        ),
        dtype=torch.float32,
        shard_bytes=10**9,
    )
    folder = tmp_path_factory.mktemp("presets") / "like_golden"
    create_checkpoint(folder, preset)
    return folder


def test_the_files_are_the_references(like_golden: Path, checkpoint: Path) -> None:
    assert set(_files(like_golden)) == set(_files(checkpoint))


def test_settings_are_the_references(like_golden: Path, checkpoint: Path) -> None:
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (like_golden, checkpoint))
    assert ours == {**theirs, "eps": 1e-6}
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        ours, theirs = (json.loads((folder / AUDIO_ENCODER / name).read_text()) for folder in (like_golden, checkpoint))
        assert ours == theirs
    tokenizer = "google/umt5-xxl/tokenizer_config.json"
    assert (like_golden / tokenizer).read_bytes() == (checkpoint / tokenizer).read_bytes()


@pytest.mark.parametrize(
    ("file", "resized"),
    [
        (NETWORK, set()),
        (VAE, set()),
        (TEXT_ENCODER, {"token_embedding.weight"}),
        (f"{AUDIO_ENCODER}/model.safetensors", {"lm_head.weight", "lm_head.bias"}),
    ],
    ids=["network", "vae", "text", "audio"],
)
def test_tensors_are_the_references(like_golden: Path, checkpoint: Path, file: str, resized: set[str]) -> None:
    ours, theirs = _layout(like_golden / file), _layout(checkpoint / file)
    assert set(ours) == set(theirs)
    assert {name for name in ours if ours[name] != theirs[name]} == resized


def test_safetensors_say_that_they_are_pytorchs(tiny: Path) -> None:
    for file in (NETWORK, f"{AUDIO_ENCODER}/model.safetensors"):
        with safe_open(tiny / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_the_video_is_lively(tiny: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    engine = Engine.from_pretrained(tiny, config=EngineConfig(size="64x64", devices="cpu"))
    frames = np.concatenate([chunk.frames for chunk in engine.generate(image, speech(1.44), "a person speaks")])
    assert frames.std() > 20
    assert frames.std(axis=0).mean() > 20
    assert ((frames == 0) | (frames == 255)).mean() < 0.3


def test_tiny_is_tiny(tiny: Path) -> None:
    assert sum(len(content) for content in _files(tiny).values()) < 5_000_000


def test_weights_move_the_video_with_the_audio_the_prompt_and_the_image(tiny: Path) -> None:
    engine = Engine.from_pretrained(tiny, config=EngineConfig(size="64x64", devices="cpu"))
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)

    def last_frames(image: np.ndarray, audio: np.ndarray, prompt: str) -> np.ndarray:
        *_, last = engine.generate(image, audio, prompt, max_blocks=2)
        return last.frames.astype(float)

    base = last_frames(image, speech(2.0), "a")
    for other in (
        last_frames(image[::-1].copy(), speech(2.0), "a"),
        last_frames(image, speech(2.0, seed=1), "a"),
        last_frames(image, speech(2.0), "someone else"),
    ):
        assert np.abs(other - base).mean() > 0.5


def test_same_seed_same_bytes(tiny: Path, tmp_path: Path) -> None:
    create_checkpoint(tmp_path / "again", TINY, seed=0)
    create_checkpoint(tmp_path / "other", TINY, seed=1)
    assert _files(tmp_path / "again") == _files(tiny)
    changed = {name for name, content in _files(tmp_path / "other").items() if content != _files(tiny)[name]}
    assert changed == {NETWORK, VAE, TEXT_ENCODER, f"{AUDIO_ENCODER}/model.safetensors"}


def test_shards_hold_the_same_tensors(tiny: Path, tmp_path: Path) -> None:
    create_checkpoint(tmp_path / "sharded", dataclasses.replace(TINY, shard_bytes=500_000))
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [
        f"diffusion_pytorch_model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    index = json.loads((tmp_path / "sharded" / f"{NETWORK}.index.json").read_text())
    whole = dict(TensorStore([tiny / NETWORK]))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    store = TensorStore.of_model(tmp_path / "sharded", "diffusion_pytorch_model")
    assert index["weight_map"] == {name: info.shard.name for name, info in store.tensors.items()}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in store)
    sizes = Counter(index["weight_map"].values())
    assert set(sizes) == set(shards)


def test_progress_counts_the_bytes(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    create_checkpoint(tmp_path / "new", TINY, progress=lambda *call: calls.append(call))
    planned = sum(spec.bytes for tensors in checkpoint_tensors(TINY).values() for spec in tensors.values())
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert done[-1] == planned
    assert {total for _, _, total in calls} == {planned}
    assert set(checkpoint_tensors(TINY)) == {part for part, _, _ in calls}


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small preset has 350 MB."""
    monkeypatch.undo()  # untouched memory costs nothing, unless the test suite poisons it
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    create_checkpoint(tmp_path / "small", PRESETS["small"])
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 60_000_000
    assert sum(path.stat().st_size for path in (tmp_path / "small").rglob("*")) > 300_000_000
    shutil.rmtree(tmp_path / "small")


def test_the_14b_preset_has_the_published_sizes() -> None:
    files = checkpoint_tensors(PRESETS["14b"])
    bytes_of = {file: sum(spec.bytes for spec in tensors.values()) for file, tensors in files.items()}
    shards = [file for file in files if file.startswith("diffusion_pytorch_model")]
    assert len(shards) == 4
    assert sum(len(files[shard]) for shard in shards) == 1260
    assert {spec.dtype for shard in shards for spec in files[shard].values()} == {torch.bfloat16}
    assert sum(bytes_of[shard] for shard in shards) == 2 * 16_295_755_609
    assert bytes_of[VAE] == 4 * 126_892_531
    assert bytes_of[TEXT_ENCODER] == 2 * 5_680_910_336
    assert bytes_of[f"{AUDIO_ENCODER}/model.safetensors"] == 4 * 315_471_521


def test_the_14b_settings_leave_out_what_the_published_ones_do() -> None:
    stated = json.loads(create._config_text(PRESETS["14b"].model))
    assert not {"text_dim", "patch_size", "window_size", "qk_norm", "cross_attn_norm"} & set(stated)
    assert stated["_class_name"] == "WanModel_S2V"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fill_the_disk(part: str, done: int, total: int) -> None:
    if part.startswith("models_t5"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        create_checkpoint(tmp_path / "new", TINY, progress=_interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(OutputError, match=r"new: cannot be written \(No space left on device\); nothing is left of it"):
        create_checkpoint(tmp_path / "new", TINY, progress=_fill_the_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert list((tmp_path / "new").iterdir()) == []


def test_an_empty_folder_is_used(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "empty").mkdir()
    create_checkpoint(tmp_path / "empty", TINY)
    assert _files(tmp_path / "empty") == _files(tiny)


def _occupied(folder: Path) -> Path:
    (folder / "notes.txt").write_text("mine")
    return folder


def _a_file(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file"


def _left_over(folder: Path) -> Path:
    (folder / ".new.part").mkdir()
    return folder / "new"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_occupied, "is not empty; a checkpoint goes to a new or empty folder"),
        (_a_file, "is a file; a checkpoint goes to a new or empty folder"),
        (lambda folder: folder / "no" / "new", "the folder .*/no does not exist; create it first"),
        (_left_over, r"\.new\.part: left by a run that was killed"),
        (lambda _: Path("/proc/new"), "No such file|no permission|the disk has 0.000 GB free"),
        (lambda folder: folder / ("n" * 260), "File name too long"),
    ],
    ids=["occupied", "file", "no-parent", "left-over", "proc", "long-name"],
)
def test_an_impossible_folder_is_refused(tmp_path: Path, prepare, message: str) -> None:
    folder = prepare(tmp_path)
    before = _files(tmp_path)
    with pytest.raises(OutputError, match=message):
        create_checkpoint(folder, TINY)
    assert _files(tmp_path) == before


def test_a_small_disk_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 4 * 10**9))
    with pytest.raises(OutputError, match=r"new: needs 45\.72\d GB, the disk has 4\.000 GB free"):
        create_checkpoint(tmp_path / "new", PRESETS["14b"])
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_is_umt5s_in_small(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny / "google/umt5-xxl")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (PAD_ID, END_ID, UNKNOWN_ID)
    assert len(tokenizer) <= VOCABULARY <= TINY.text.vocabulary
    ids = tokenizer("A woman speaks calmly. Ça va, 你好? Ж 🙂 \u0000").input_ids
    assert ids[-1] == END_ID
    assert max(ids) < VOCABULARY
    assert tokenizer("").input_ids == [END_ID]
    assert tokenizer.decode(tokenizer("A man talks.").input_ids, skip_special_tokens=True) == "A man talks."


def test_a_tokenizer_keeps_to_its_vocabulary(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, vocabulary=400)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) <= 400
    with pytest.raises(ConfigError, match="a vocabulary of 100 is too small"):
        write_tokenizer(tmp_path, vocabulary=100)


def test_presets_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="12 audio layers give 13 hidden states, the network averages 25"):
        dataclasses.replace(TINY, audio=dataclasses.replace(TINY.audio, layers=12))
    with pytest.raises(ConfigError, match="the tokenizer needs a vocabulary of 512, not 128"):
        dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, vocabulary=128))


def test_presets_are_called_by_their_names() -> None:
    assert {name: preset.name for name, preset in PRESETS.items()} == {"tiny": "tiny", "small": "small", "14b": "14b"}
