"""A checkpoint's network, straight to its device, dtype and quantisation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from pathlib import Path

import torch
from liveavatar_kernels.e4m3 import E4M3
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from ..model import Network
from ..model.linear import Fp8Linear
from ..model.quantize import LayerRows, use_fp8
from .conversion import NOTE, Conversion
from .layout import CONFIG, NETWORK
from .lora import LoraAdapter, pieces_of
from .tensors import DTYPES, TensorStore, assign, check_names_and_shapes, listed

_log = logging.getLogger(__name__)

_ALIGNMENT = 64
LoadProgress = Callable[[int, int], None]
"""Called with the tensors of the network loaded and to be loaded."""


def empty_network(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Network:
    """A network without storage, for its names, shapes and dtypes."""
    with torch.device("meta"):
        network = Network(config).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if network.keeps_float32(name) else dtype)
    return network


def network_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that an original checkpoint's network holds."""
    return {name: tuple(tensor.shape) for name, tensor in empty_network(config).state_dict().items()}


class NetworkBuilder:
    """A network that is made tensor by tensor, in any order, from a checkpoint's names.

    Which layers are in e4m3 is decided first, without storage; a tensor takes its place on the device when it comes.

    Attributes:
        network: usable once every tensor of `shapes` has come.
        shapes: name -> shape of the tensors to come, also where a tensor has been quantised before.
        quantized: those that are stored in e4m3 then, each followed by its scales.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        fp8_skip: tuple[str, ...] | None = None,
        *,
        converted: bool = False,
    ) -> None:
        """Decide what the network is made of.

        Args:
            config: its sizes.
            dtype: of most parameters.
            device: where they go.
            fp8_skip: parts of the names of linear layers that stay out of e4m3; None: all do.
            converted: whether the tensors of layers in e4m3 come quantised, with scales.

        Raises:
            ConfigError: an entry of `fp8_skip` is part of no layer's name.
        """
        self._device = device
        self.network = empty_network(config, dtype)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.network.state_dict().items()}
        self._places: dict[str, LayerRows] = {} if fp8_skip is None else use_fp8(self.network, fp8_skip)
        self.quantized: set[str] = set()
        if converted:
            self.quantized = {f"{layer}.weight" for layer in self._places}
            self.shapes |= {f"{layer}.weight_scale": (place.count,) for layer, place in self._places.items()}

    def allocate(self) -> None:
        """Take all storage at once, so that what is needed only for a moment leaves no gaps between parameters."""
        self.network.to_empty(device=self._device)

    def put(self, name: str, stored: Tensor, adapter: LoraAdapter | None = None) -> None:
        """Put a tensor of a checkpoint into its place, merged with the adapter where that changes it."""
        layer, _, part = name.rpartition(".")
        place = self._places.get(layer)
        if place is not None and part == "weight" and stored.dtype != E4M3:
            self._quantize(place, pieces_of(name, stored, adapter))
        elif place is not None:
            self._storage(f"{place.layer}.{part}")[place.rows] = stored
        elif adapter is not None and name in adapter.down:
            target = self._storage(name)
            for first, rows in adapter.merged(name, stored):
                target[first : first + len(rows)] = rows
        elif (parameter := self.network.get_parameter(name)).is_meta:
            assign(self.network, name, _aligned(stored.to(self._device, parameter.dtype)))
        else:
            parameter.copy_(stored)

    def _quantize(self, place: LayerRows, pieces: Iterable[tuple[int, Tensor]]) -> None:
        layer = self.network.get_submodule(place.layer)
        assert isinstance(layer, Fp8Linear)
        self._storage(f"{place.layer}.weight")
        self._storage(f"{place.layer}.weight_scale")
        for first, rows in pieces:
            layer.quantize(place.first + first, rows)

    def _storage(self, name: str) -> Tensor:
        """A parameter, with storage from now on."""
        parameter = self.network.get_parameter(name)
        if parameter.is_meta:
            assign(self.network, name, torch.empty_like(parameter, device=self._device))
        return self.network.get_parameter(name)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address as the allocator gives it: CPU kernels round differently where a mapped file has it."""
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT else tensor


def load_network(
    folder: Path,
    lora: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    progress: LoadProgress | None = None,
    fp8_skip: tuple[str, ...] | None = None,
    *,
    lora_scale: float | None = None,
) -> Network:
    """Load `config.json` and `diffusion_pytorch_model*.safetensors` of `folder`, an original or converted checkpoint.

    Names, shapes and dtypes, also the adapter's, are checked from the headers before anything is allocated. Then
    tensors go one by one to the device, are merged with the adapter in float32 where it changes them, and take their
    final form there: neither host nor device ever holds much more than that form.

    Args:
        folder: the checkpoint.
        lora: an adapter to merge, or None.
        dtype: of most parameters; some stay in float32.
        device: where the network goes.
        progress: called after each tensor.
        fp8_skip: parts of the names of linear layers that stay out of e4m3; None: all do.
        lora_scale: of the adapter, alpha / rank; None: what its file says.

    Raises:
        CheckpointError: files are missing or damaged, or tensors do not fit.
        ConfigError: an entry of `fp8_skip` is part of no layer's name, or a converted checkpoint is something else.
    """
    config, conversion = ModelConfig.from_file(folder / CONFIG), Conversion.of(folder)
    if conversion is not None:
        conversion.check(folder, lora, fp8_skip)
    converted = conversion is not None and conversion.precision == "fp8"
    builder = NetworkBuilder(config, dtype, device, fp8_skip, converted=converted)
    store = TensorStore.of_model(folder, NETWORK)
    check_network(folder, store, builder, conversion)
    adapter = LoraAdapter.from_file(lora, builder.shapes, lora_scale) if lora is not None else None
    if device.type == "cuda":
        builder.allocate()
    with closing(store.read(device)) as tensors:
        for count, (name, stored) in enumerate(tensors, 1):
            builder.put(name, stored, adapter)
            if progress is not None:
                progress(count, len(builder.shapes))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _log.info("loaded %d tensors of %s as %s on %s", len(builder.shapes), folder, dtype, device)
    return builder.network


def check_network(folder: Path, store: TensorStore, builder: NetworkBuilder, conversion: Conversion | None) -> None:
    """Compare the headers of a checkpoint's shards with what a network is made of.

    Raises:
        CheckpointError: names, shapes or dtypes differ, or the shards were not converted as `config.json` says.
    """
    check_note(folder, store, conversion)
    check_names_and_shapes(folder, builder.shapes, {name: info.shape for name, info in store.tensors.items()})
    check_dtypes(folder, store, builder.quantized)


def check_note(folder: Path, store: TensorStore, conversion: Conversion | None) -> None:
    """Compare what `config.json` and the shards say of how they were converted.

    Raises:
        CheckpointError: they differ.
    """
    noted = {} if conversion is None else conversion.metadata
    if store.metadata.get(NOTE) != noted.get(NOTE):
        raise CheckpointError(f"{folder}: {CONFIG} and the shards {NETWORK}* are not of the same conversion")


def check_dtypes(folder: Path, store: TensorStore, quantized: Collection[str]) -> None:
    """Check that the tensors named, and no others, are in e4m3.

    Raises:
        CheckpointError: a dtype does not fit.
    """
    strange = sorted(
        f"{name} is {info.dtype}"
        for name, info in store.tensors.items()
        if info.dtype not in DTYPES or (DTYPES[info.dtype] == E4M3) != (name in quantized)
    )
    if strange:
        raise CheckpointError(
            f"{folder}: tensors of a dtype that does not fit, as if quantised by something else: {listed(strange)}"
        )
