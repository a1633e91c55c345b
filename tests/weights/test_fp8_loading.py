"""Linear layers quantised while a network is loaded: row by row, with little more memory than the result."""

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from liveavatar_kernels.e4m3 import quantize_rows
from peak_memory import PeakMemory
from safetensors.torch import load_file, save_file
from support import CPU, GOLDEN, bits

from liveavatar_engine.config import ModelConfig
from liveavatar_engine.config.engine import REFERENCE_FP8_SKIP
from liveavatar_engine.errors import CheckpointError, ConfigError
from liveavatar_engine.model import Network
from liveavatar_engine.model.linear import Fp8Linear
from liveavatar_engine.weights import staging, tensors
from liveavatar_engine.weights.network import NetworkBuilder, load_network
from liveavatar_engine.weights.staging import Extent, staged
from liveavatar_engine.weights.tensors import TensorStore, row_pieces

NETWORK = "diffusion_pytorch_model.safetensors"
LORA = GOLDEN / "lora.safetensors"


def _load(folder: Path, skip=REFERENCE_FP8_SKIP, lora: Path | None = None) -> Network:
    return load_network(folder, lora, torch.bfloat16, CPU, fp8_skip=skip)


def _same(one: Network, other: Network) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and bits(tensor).equal(bits(others[name])) for name, tensor in mine.items()
    )


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on a few rows at a time, as with large layers."""
    monkeypatch.setattr(tensors, "_HOST_PIECE", 700)


@pytest.fixture
def staged_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read through buffers on a CPU too, as for a GPU; they are small, so that tensors are longer."""

    def read(store: TensorStore, device: torch.device):
        return staged(map(store._extent, store.in_order()), device, piece=3001, buffers=3, threads=2)

    monkeypatch.setattr(TensorStore, "read", read)


@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
def test_every_row_is_quantised_from_its_merged_float32_values(
    lora: Path | None, checkpoint: Path, small_pieces: None
) -> None:
    exact = load_network(checkpoint, lora, torch.float32, CPU).state_dict()
    network = _load(checkpoint, lora=lora)
    for layer in range(network.config.num_layers):
        attention = network.blocks[layer].self_attn
        rows = len(attention.qkv.weight) // 3
        for index, part in enumerate("qkv"):
            values, scale = quantize_rows(exact[f"blocks.{layer}.self_attn.{part}.weight"])
            place = slice(index * rows, (index + 1) * rows)
            assert bits(attention.qkv.weight[place]).equal(bits(values))
            assert attention.qkv.weight_scale[place].equal(scale)
            bias = exact[f"blocks.{layer}.self_attn.{part}.bias"]
            assert attention.qkv.bias[place].equal(bias.bfloat16())
        values, scale = quantize_rows(exact[f"blocks.{layer}.ffn.0.weight"])
        assert bits(network.blocks[layer].ffn[0].weight).equal(bits(values))
        assert network.blocks[layer].ffn[0].weight_scale.equal(scale)


@pytest.mark.parametrize("skip", [REFERENCE_FP8_SKIP, (), ("self_attn.k", "ffn.2")], ids=["reference", "none", "some"])
def test_the_same_in_any_order(skip: tuple[str, ...], checkpoint: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in load_file(checkpoint / NETWORK).items()}
    config = ModelConfig.from_file(checkpoint / "config.json")
    forward, backward, at_once = (NetworkBuilder(config, torch.bfloat16, CPU, skip) for _ in range(3))
    at_once.allocate()
    for name, tensor in state.items():
        forward.put(name, tensor)
    for name, tensor in reversed(state.items()):
        backward.put(name, tensor)
        at_once.put(name, tensor)
    assert _same(backward.network, forward.network)
    assert _same(at_once.network, forward.network)
    assert not any(parameter.is_meta for parameter in forward.network.parameters())


def test_layers_and_dtypes(checkpoint: Path) -> None:
    network = _load(checkpoint)
    assert isinstance(network.blocks[0].self_attn.qkv, Fp8Linear)
    assert network.blocks[0].ffn[0].dtype == torch.bfloat16
    everything = _load(checkpoint, ())
    assert everything.time_embedding[0].dtype == torch.float32, "it stays wide around its products"
    assert everything.time_embedding[0].bias.dtype == torch.float32


def test_parameters_are_aligned_wherever_they_lie_in_the_file(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    save_file(load_file(copy / NETWORK), copy / NETWORK, {"made": "up to shift what follows"})
    for folder in (checkpoint, copy):
        parameters = load_network(folder, None, torch.float32, CPU).named_parameters()
        assert not [name for name, parameter in parameters if parameter.data_ptr() % 64]


def test_a_name_that_skips_nothing_is_refused_before_anything_is_read(checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr(TensorStore, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ConfigError, match="no linear layer's name contains 'fnn'"):
        _load(checkpoint, ("fnn",))


def test_memory_stays_near_the_result(checkpoint: Path, small_pieces: None, staged_reading: None) -> None:
    largest = max(tensor.nbytes for tensor in load_file(checkpoint / NETWORK).values())
    with PeakMemory("cpu") as memory:
        network = _load(checkpoint, lora=LORA)
    size = sum(parameter.nbytes for parameter in network.parameters())
    assert size < memory.peak < size + 1.6 * largest, "the tensor that is being quantised, and buffers"


def test_pieces_cover_all_rows() -> None:
    for shape in [(1000, 513), (3, 1 << 20), (7,), (1, 1), (0, 5)]:
        rows = list(row_pieces(torch.empty(shape, dtype=torch.uint8)))
        assert [row for piece in rows for row in range(piece.start, piece.stop)] == list(range(shape[0]))


# --- reading ahead


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("liveavatar-read")]


def _extents(path: Path) -> list[Extent]:
    store = TensorStore([path])
    return [store._extent(name) for name in store.in_order()]


def test_staged_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    state = {
        "large": torch.randn(101, 37),
        "odd": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "bytes": torch.randn(9, 7).to(torch.float8_e4m3fn),
    }
    save_file(state, tmp_path / "file.safetensors")
    read = dict(staged(_extents(tmp_path / "file.safetensors"), CPU, piece=1000, buffers=2, threads=3))
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert (read[name].shape, read[name].dtype) == (tensor.shape, tensor.dtype)
        assert bits(read[name].reshape(-1)).equal(bits(tensor.reshape(-1))), name
    assert not _threads()


def test_a_staged_network_is_the_same(checkpoint: Path, request: pytest.FixtureRequest) -> None:
    mapped = _load(checkpoint, lora=LORA)
    request.getfixturevalue("staged_reading")
    assert _same(_load(checkpoint, lora=LORA), mapped)
    assert not _threads()


def test_no_more_is_read_ahead_than_the_buffers_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"t{i:02}": torch.full((100,), float(i)) for i in range(20)}, tmp_path / "file.safetensors")
    started: list[str] = []
    real = staging._read_into
    monkeypatch.setattr(
        staging, "_read_into", lambda target, piece: (started.append(piece.of.name), real(target, piece))
    )
    for taken, (_, tensor) in enumerate(staged(_extents(tmp_path / "file.safetensors"), CPU, buffers=4, threads=2), 1):
        assert tensor.eq(taken - 1).all()
        assert len(started) <= taken + 4
    assert len(started) == 20


@pytest.mark.parametrize("cut", [1, 20_000])
def test_a_file_that_shrinks_under_way_is_named(
    cut: int, checkpoint: Path, tmp_path: Path, staged_reading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    real = TensorStore.read

    def read(store: TensorStore, device: torch.device):
        os.truncate(copy / NETWORK, (copy / NETWORK).stat().st_size - cut)
        return real(store, device)

    monkeypatch.setattr(TensorStore, "read", read)
    with pytest.raises(CheckpointError, match=f"{NETWORK}: truncated: it ends within tensor "):
        _load(copy)
    assert not _threads()


def test_nothing_runs_on_after_an_error(checkpoint: Path, staged_reading) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_network(checkpoint, None, torch.bfloat16, CPU, fail, REFERENCE_FP8_SKIP)
    assert not _threads()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_weights_that_something_else_quantised_are_refused(
    dtype: torch.dtype, checkpoint: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    state = load_file(copy / NETWORK)
    state["blocks.0.ffn.0.weight"] = state["blocks.0.ffn.0.weight"].to(dtype)
    save_file(state, copy / NETWORK)
    with pytest.raises(CheckpointError, match="of a dtype that does not fit.*blocks.0.ffn.0.weight is (I8|F8_E4M3)"):
        _load(copy)
