"""Checkpoints with random weights in the reference's layout, streamed to disk: memory does not grow with the model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config import ModelConfig
from ..config.geometry import SPEECH_RATE
from ..vae.vae import Vae
from .layout import AUDIO_ENCODER, CONFIG, NETWORK, TEXT_ENCODER, TOKENIZER, VAE
from .network import network_shapes
from .presets import Preset, TextEncoderSizes
from .tokenizer import write_tokenizer
from .writing import SMALL_FILES, Progress, TensorFile, Tensors, TensorSpec, network_files, new_folder, write_index

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config

_log = logging.getLogger(__name__)

_CHUNK = 1 << 22
"""Values drawn at a time."""
_UNSTATED = ("text_dim", "patch_size", "window_size", "qk_norm", "cross_attn_norm")
"""Settings that the published `config.json` leaves at their defaults."""
_LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", "'", "-", *"abcdefghijklmnopqrstuvwxyz")
"""What the published speech recogniser spells with."""


def create_checkpoint(folder: Path, preset: Preset, *, seed: int = 0, progress: Progress | None = None) -> None:
    """Write a complete checkpoint with random weights, which make a lively but meaningless video.

    Every tensor is drawn from a generator of its own, so the same seed gives the same files. Nothing is left behind
    when writing fails or is interrupted: everything goes to a hidden folder beside `folder`, renamed at the end.

    Args:
        folder: does not exist yet, or is empty; its parent exists.
        preset: what to write.
        seed: any integer.
        progress: called now and then.

    Raises:
        OutputError: `folder` cannot be written, is not empty, or the disk has too little room.
    """
    plan = checkpoint_tensors(preset)
    total = sum(spec.bytes for tensors in plan.values() for spec in tensors.values())
    with new_folder(folder, total + SMALL_FILES) as part:
        _write(part, preset, plan, _Painter(seed, total, progress))
    _log.info("wrote a %s checkpoint of %d bytes to %s", preset.name, total, folder)


def checkpoint_tensors(preset: Preset) -> dict[str, Tensors]:
    """Name -> tensor of every file with weights: the network's shards, the VAE, the text and the audio encoder."""
    network = {name: TensorSpec(shape, preset.dtype) for name, shape in network_shapes(preset.model).items()}
    return {
        **network_files(network, preset.shard_bytes),
        VAE: _vae_tensors(preset),
        TEXT_ENCODER: _text_tensors(preset.text, preset.model.text_dim),
        f"{AUDIO_ENCODER}/model.safetensors": _audio_tensors(preset),
    }


class _Painter:
    """Fills tensors with random values, a chunk at a time, straight into a file."""

    def __init__(self, seed: int, total: int, progress: Progress | None) -> None:
        self._seed, self._total, self._progress = seed, total, progress
        self._written = 0

    def fill(self, file: BinaryIO, part: str, name: str, spec: TensorSpec) -> None:
        """Write the tensor at the file's position. It depends on the seed, its name and its shape only."""
        mean, std = distribution(name, spec.shape)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        for start in range(0, spec.count, _CHUNK):
            values = torch.empty(min(_CHUNK, spec.count - start)).normal_(mean, std, generator=generator)
            file.write(values.to(spec.dtype).view(torch.uint8).numpy().data)
            self._written += len(values) * spec.dtype.itemsize
            if self._progress is not None:
                self._progress(part, self._written, self._total)


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that keep signals near unit variance through the whole model."""
    leaf = name.rpartition(".")[2]
    if name == "casual_audio_encoder.weights":
        return 0.01, 0.001
    if leaf in ("gamma", "original0") or (leaf == "weight" and len(shape) == 1):
        return 1.0, 0.1
    if leaf == "bias":
        return 0.0, 0.02
    if leaf == "modulation":
        return 0.0, shape[-1] ** -0.5
    if leaf == "padding_tokens" or (name.endswith(("embedding.weight", "cond_mask.weight")) and len(shape) == 2):
        return 0.0, 0.5
    return 0.0, math.prod(shape[1:]) ** -0.5


def _write(folder: Path, preset: Preset, plan: Mapping[str, Tensors], painter: _Painter) -> None:
    (folder / CONFIG).write_text(_config_text(preset.model), encoding="utf-8")
    (folder / TOKENIZER).mkdir(parents=True)
    write_tokenizer(folder / TOKENIZER)
    (folder / AUDIO_ENCODER).mkdir()
    _write_audio_settings(folder / AUDIO_ENCODER, preset)
    write_index(folder, {file: tensors for file, tensors in plan.items() if file.startswith(NETWORK)})
    for file, tensors in plan.items():
        write = _write_pth if file.endswith(".pth") else _write_safetensors
        write(folder / file, file, tensors, painter)


def _write_safetensors(path: Path, part: str, tensors: Tensors, painter: _Painter) -> None:
    with TensorFile(path, tensors) as file:
        for name in file.order:
            painter.fill(file.at(name), part, name, tensors[name])


def _write_pth(path: Path, part: str, tensors: Tensors, painter: _Painter) -> None:
    """A file as `torch.save` makes it, first without its values; memory that is never touched costs nothing."""
    try:
        with torch.serialization.skip_data():
            torch.save({name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in tensors.items()}, path)
    except RuntimeError as error:
        raise OSError(f"{part}: torch reports {error}") from error
    with FakeTensorMode():
        places = torch.load(path, weights_only=True)
    with path.open("r+b") as file:
        for name, spec in tensors.items():
            file.seek(places[name].untyped_storage()._checkpoint_offset)
            painter.fill(file, part, name, spec)


def _config_text(model: ModelConfig) -> str:
    entries = json.loads(model.to_json())
    for field in dataclasses.fields(model):
        if field.name in _UNSTATED and getattr(model, field.name) == field.default:
            del entries[field.name]
    return json.dumps({**entries, "zero_init": False}, indent=1)


def _vae_tensors(preset: Preset) -> Tensors:
    with torch.device("meta"):
        state = Vae(preset.vae).state_dict()
    return {name: TensorSpec(tuple(tensor.shape), torch.float32) for name, tensor in state.items()}


def _text_tensors(sizes: TextEncoderSizes, dim: int) -> Tensors:
    """UMT5's encoder under Wan's names."""
    inner, ffn = sizes.heads * sizes.head_dim, sizes.ffn_dim
    block = {
        "norm1": (dim,),
        "attn.q": (inner, dim),
        "attn.k": (inner, dim),
        "attn.v": (inner, dim),
        "attn.o": (dim, inner),
        "norm2": (dim,),
        "ffn.gate.0": (ffn, dim),
        "ffn.fc1": (ffn, dim),
        "ffn.fc2": (dim, ffn),
        "pos_embedding.embedding": (sizes.buckets, sizes.heads),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (sizes.vocabulary, dim)}
    for index in range(sizes.layers):
        shapes |= {f"blocks.{index}.{name}.weight": shape for name, shape in block.items()}
    shapes["norm.weight"] = (dim,)
    return {name: TensorSpec(shape, sizes.dtype) for name, shape in shapes.items()}


def audio_config(preset: Preset) -> Wav2Vec2Config:
    """The published encoder's variant of wav2vec2, "large, layer norm first", at the preset's sizes."""
    from transformers import Wav2Vec2Config

    sizes = preset.audio
    return Wav2Vec2Config(
        architectures=["Wav2Vec2ForCTC"],
        dtype="float32",
        vocab_size=len(_LETTERS),
        hidden_size=preset.model.audio_dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.ffn_dim,
        conv_dim=(sizes.conv_dim,) * 7,
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=sizes.position_kernel,
        num_conv_pos_embedding_groups=sizes.position_groups,
        mask_time_prob=0.0,
    )


def _audio_tensors(preset: Preset) -> Tensors:
    from transformers import Wav2Vec2ForCTC

    with torch.device("meta"):
        state = Wav2Vec2ForCTC(audio_config(preset)).state_dict()
    return {name: TensorSpec(tuple(tensor.shape), torch.float32) for name, tensor in state.items()}


def _write_audio_settings(folder: Path, preset: Preset) -> None:
    """Everything of a `Wav2Vec2ForCTC` and its processor but the weights."""
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

    audio_config(preset).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=SPEECH_RATE, do_normalize=True, return_attention_mask=True).save_pretrained(
        folder
    )
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({letter: index for index, letter in enumerate(_LETTERS)}), encoding="utf-8")
    Wav2Vec2CTCTokenizer(str(vocabulary)).save_pretrained(folder)
