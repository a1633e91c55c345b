"""What is in a checkpoint directory, also in an incomplete or damaged one."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..conditions.audio_encoder import AudioEncoder
from ..conditions.text import TextEncoder, load_tokenizer
from ..config import EngineConfig, ModelConfig, Size, StreamGeometry
from ..errors import CheckpointError, ConfigError
from ..vae.vae import load_vae
from .conversion import Conversion, settled
from .layout import AUDIO_ENCODER, CONFIG, NETWORK, TEXT_ENCODER, TOKENIZER, VAE, missing_parts
from .memory import MemoryEstimate, PartSizes, predict_memory, stream_geometry
from .network import NetworkBuilder, check_dtypes, check_note
from .tensors import TensorInfo, TensorStore, read_pickle

_META = torch.device("meta")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
"""Safetensors' names of dtypes, and torch's."""


@dataclass(frozen=True)
class PartReport:
    """One part of a checkpoint.

    Attributes:
        name: "config", "network", "VAE", "text encoder", "tokenizer" or "audio encoder".
        files: size in bytes by path within the checkpoint; empty when nothing of the part is there.
        tensors: by name, as far as files can be read; dtypes by torch's names.
        problems: why an engine could not load the part, one entry per cause; empty for a good one.
    """

    name: str
    files: Mapping[str, int]
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def present(self) -> bool:
        return bool(self.files)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(self.files.values())

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Parameters by dtype."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += math.prod(tensor.shape)
        return dict(counts)


@dataclass(frozen=True)
class WrongShape:
    """A tensor whose shape is not what `config.json` asks for."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True)
class NetworkMismatch:
    """How the network's tensors differ from those that `config.json` asks for; names sorted."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[WrongShape, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint directory.

    Attributes:
        folder: the directory.
        model: the network's sizes; None when `config.json` cannot be used.
        parts: in the order config, network, VAE, text encoder, tokenizer, audio encoder.
        mismatch: of the network's tensors; None when the sizes are unknown.
        geometry: of the stream for which memory is predicted; None when the sizes are unknown.
        memory: what an engine needs; rows of parts that cannot be read are left out or zero.
        device: the kind of device it is predicted for.
        conversion: how the checkpoint was converted; None: it is an original.
    """

    folder: Path
    model: ModelConfig | None
    parts: tuple[PartReport, ...]
    mismatch: NetworkMismatch | None
    geometry: StreamGeometry | None
    memory: MemoryEstimate | None
    device: torch.device = _META
    conversion: Conversion | None = None

    @property
    def ok(self) -> bool:
        """Whether an engine can load the checkpoint, as far as can be told without reading the network's values."""
        return all(part.ok for part in self.parts) and not self.mismatch

    def __getitem__(self, name: str) -> PartReport:
        """The part of that name."""
        return {part.name: part for part in self.parts}[name]


def inspect_checkpoint(folder: Path, size: Size | None = None, config: EngineConfig | None = None) -> CheckpointReport:
    """Look through a checkpoint; whatever is wrong with it goes to the report.

    Args:
        folder: the checkpoint.
        size: for which memory is predicted; of an area, for a 16:9 picture. None: the configuration's.
        config: precision, steps, sessions and the like for which memory is predicted. Its device need not be there;
            "auto" is a GPU.

    Raises:
        CheckpointError: `folder` is not a directory.
        ConfigError, InputError: the size or the precision is not possible, also not with a converted checkpoint.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'not a directory' if folder.exists() else 'no such directory'}")
    config = config or EngineConfig()
    model, conversion, settings = _config_part(folder)
    if conversion is not None:
        config = settled(config, folder, None)
    parts = (
        settings,
        network := _network_part(folder, model, conversion),
        vae := _vae_part(folder),
        text := _text_part(folder, model),
        _tokenizer_part(folder),
        audio := _audio_part(folder, model),
    )
    if model is None:
        return CheckpointReport(folder, None, parts, None, None, None)
    geometry = stream_geometry(model, config, size)
    device = _kind_of_device(config.devices)
    sizes = PartSizes.of(*({name: t.shape for name, t in part.tensors.items()} for part in (vae, text, audio)))
    memory = predict_memory(geometry, sizes if vae.ok else dataclasses.replace(sizes, vae=None), config, device)
    mismatch = _mismatch(_expected(model, conversion).shapes, network)
    return CheckpointReport(folder, model, parts, mismatch, geometry, memory, device, conversion)


def _kind_of_device(names: str | tuple[str, ...]) -> torch.device:
    """For which memory is predicted; it need not be there."""
    name = "cuda" if isinstance(names, str) else names[0]
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    return torch.device(name)


def _config_part(folder: Path) -> tuple[ModelConfig | None, Conversion | None, PartReport]:
    problems: list[str] = []
    model = conversion = None
    with _noting(problems):
        model = ModelConfig.from_file(folder / CONFIG)
        conversion = Conversion.of(folder)
    return model, conversion, PartReport("config", _files(folder, CONFIG), problems=tuple(problems))


def _network_part(folder: Path, model: ModelConfig | None, conversion: Conversion | None) -> PartReport:
    """Headers of the network's shards; where some cannot be read, those of the others."""
    problems = _missing(folder, NETWORK)
    tensors: dict[str, TensorInfo] = {}
    with _noting(problems):
        store = TensorStore.of_model(folder, NETWORK)
        tensors = _stored(store)
        check_note(folder, store, conversion)
        if model is not None:
            check_dtypes(folder, store, _expected(model, conversion).quantized)
    for shard in sorted(folder.glob(f"{NETWORK}*.safetensors")) if not tensors else ():
        with _noting(problems):
            tensors |= _stored(TensorStore([shard]))
    return PartReport("network", _files(folder, f"{NETWORK}*"), tensors, tuple(problems))


def _expected(model: ModelConfig, conversion: Conversion | None) -> NetworkBuilder:
    """What the network's tensors should be."""
    skip = conversion.fp8_skip if conversion is not None and conversion.precision == "fp8" else None
    return NetworkBuilder(model, torch.bfloat16, _META, skip, converted=skip is not None)


def _mismatch(expected: Mapping[str, tuple[int, ...]], network: PartReport) -> NetworkMismatch:
    found = network.tensors
    return NetworkMismatch(
        missing=tuple(sorted(set(expected) - set(found))),
        unexpected=tuple(sorted(set(found) - set(expected))),
        misshapen=tuple(
            WrongShape(name, found[name].shape, expected[name])
            for name in sorted(set(expected) & set(found))
            if found[name].shape != expected[name]
        ),
    )


def _vae_part(folder: Path) -> PartReport:
    problems = _missing(folder, VAE)
    tensors: dict[str, TensorInfo] = {}
    if not problems:
        with _noting(problems):
            tensors = _pickled(folder / VAE)
            load_vae(folder / VAE, torch.float32, _META)
    return PartReport("VAE", _files(folder, VAE), tensors, tuple(problems))


def _text_part(folder: Path, model: ModelConfig | None) -> PartReport:
    problems = _missing(folder, TEXT_ENCODER)
    tensors: dict[str, TensorInfo] = {}
    if not problems:
        with _noting(problems):
            tensors = _pickled(folder / TEXT_ENCODER)
            _check_text_encoder(folder, model)
    return PartReport("text encoder", _files(folder, TEXT_ENCODER), tensors, tuple(problems))


def _check_text_encoder(folder: Path, model: ModelConfig | None) -> None:
    weights, tokenizer = folder / TEXT_ENCODER, folder / TOKENIZER
    try:
        TextEncoder.load(weights, tokenizer, torch.float32, _META)
    except CheckpointError as error:
        if not str(error).startswith(str(tokenizer)):  # the tokenizer is a part of its own
            raise
    (width,) = read_pickle(weights)["norm.weight"].shape
    if model is not None and width != model.text_dim:
        raise CheckpointError(f"{weights}: states of {width}; the network was made for {model.text_dim}")


def _tokenizer_part(folder: Path) -> PartReport:
    problems = _missing(folder, TOKENIZER)
    if not problems:
        with _noting(problems):
            load_tokenizer(folder / TOKENIZER)
    return PartReport("tokenizer", _files(folder, f"{TOKENIZER}/**/*"), problems=tuple(problems))


def _audio_part(folder: Path, model: ModelConfig | None) -> PartReport:
    """Unlike the others, this part is loaded as a whole: transformers alone knows the names it accepts."""
    problems = _missing(folder, AUDIO_ENCODER)
    tensors: dict[str, TensorInfo] = {}
    weights, pickled = (folder / AUDIO_ENCODER / name for name in ("model.safetensors", "pytorch_model.bin"))
    with _noting(problems):
        if weights.is_file():
            tensors = _stored(TensorStore([weights]))
        elif pickled.is_file():
            tensors = _pickled(pickled)
    if not problems:
        with _noting(problems):
            _check_audio_encoder(folder / AUDIO_ENCODER, model)
    return PartReport("audio encoder", _files(folder, f"{AUDIO_ENCODER}/**/*"), tensors, tuple(problems))


def _check_audio_encoder(folder: Path, model: ModelConfig | None) -> None:
    encoder = AudioEncoder.load(folder, torch.device("cpu"))
    found = (encoder.state_count, encoder.state_dim)
    if model is not None and found != (model.audio_layers, model.audio_dim):
        raise CheckpointError(
            f"{folder}: {found[0]} states of {found[1]}; the network was made for "
            f"{model.audio_layers} of {model.audio_dim}"
        )


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Turn a CheckpointError in the body into an entry of `problems`, once."""
    try:
        yield
    except CheckpointError as error:
        if str(error) not in problems:
            problems.append(str(error))


def _missing(folder: Path, part: str) -> list[str]:
    return [f"missing: {entry}" for entry in missing_parts(folder) if entry.startswith(part)]


def _files(folder: Path, pattern: str) -> dict[str, int]:
    found = (path for path in sorted(folder.glob(pattern)) if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in found}


def _stored(store: TensorStore) -> dict[str, TensorInfo]:
    return {
        name: dataclasses.replace(info, dtype=_DTYPES.get(info.dtype, info.dtype))
        for name, info in store.tensors.items()
    }


def _pickled(path: Path) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), path)
        for name, tensor in read_pickle(path).items()
    }
