"""Light decoders in files that users have: TAEHV's and LightTAE's, and the Wan VAE's with narrower layers.

TAEHV is the "Tiny AutoEncoder for Hunyuan Video" (github.com/madebyollin/taehv), whose `taew2_1` is for Wan 2.1.
LightTAE, `lighttaew2_1`, is the same network with other weights, and LightVAE, `lightvaew2_1`, a narrower Wan VAE; both
are LightX2V's (github.com/ModelTC/LightX2V). The files' encoders are not read: the checkpoint's encodes conditions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ..config.geometry import LATENT_STRIDE
from ..errors import CheckpointError
from ..weights.tensors import TensorStore, assign, check_names_and_shapes, listed, read_pickle
from .shape import VaeShape
from .vae import FRAMES_PER_STEP, LATENT_MEAN, LATENT_STD, Vae

_RGB = 3
_HEAD, _FIRST_BLOCK = 1, 3
"""Layers are numbered in the order in which they are computed, those without weights included."""
_NORMALISED, _UNNORMALISED = "taew2_1", "lighttae"

_log = logging.getLogger(__name__)
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LightLevel:
    """Layers of a TAEHV decoder at one picture size, by their names in a file.

    Attributes:
        width: channels.
        blocks: memory blocks.
        grow: the 1x1 convolution behind them, which makes two frames of one where `in_time`.
        in_time: whether it does.
        up: the convolution of the enlarged picture.
        width_above: its channels.
    """

    width: int
    blocks: tuple[str, ...]
    grow: str
    in_time: bool
    up: str
    width_above: int


@dataclass(frozen=True)
class LightShape:
    """Widths and depths of a TAEHV decoder.

    Attributes:
        widths: channels of each level, from the latents' size up, and behind the last one.
        blocks: memory blocks per level.
        in_time: whether the step behind a level also doubles the frame rate.
        latent_channels: channels of a latent.
    """

    widths: tuple[int, ...]
    blocks: int
    in_time: tuple[bool, ...]
    latent_channels: int

    @classmethod
    def of_tensors(cls, shapes: Shapes) -> LightShape:
        """Read the sizes from tensor names and shapes.

        Raises:
            CheckpointError: they are not those of a TAEHV decoder.
        """
        channels, latent_channels = _channels(shapes, f"decoder.{_HEAD}")
        blocks, start = 0, _FIRST_BLOCK
        while _has_block(shapes, start + blocks):
            blocks += 1
        widths, in_time = [channels], []
        while _has_block(shapes, start):
            grown, _ = _channels(shapes, f"decoder.{start + blocks + 1}.conv")
            above, _ = _channels(shapes, f"decoder.{start + blocks + 2}")
            in_time.append(grown > widths[-1])
            widths.append(above)
            start += blocks + 3
        return cls(tuple(widths), blocks, tuple(in_time), latent_channels)

    @property
    def frames_per_latent(self) -> int:
        return int(2 ** sum(self.in_time))

    @property
    def pixels_per_latent(self) -> int:
        """In height and width."""
        return int(2 ** len(self.in_time))

    @property
    def head(self) -> str:
        """The first convolution."""
        return f"decoder.{_HEAD}"

    @property
    def last(self) -> str:
        """The convolution to pixels, behind an activation."""
        return f"decoder.{_FIRST_BLOCK + len(self.in_time) * (self.blocks + 3) + 1}"

    @cached_property
    def levels(self) -> tuple[LightLevel, ...]:
        """From the latents' size up."""
        starts = range(_FIRST_BLOCK, _FIRST_BLOCK + len(self.in_time) * (self.blocks + 3), self.blocks + 3)
        return tuple(
            LightLevel(
                self.widths[level],
                tuple(f"decoder.{start + block}" for block in range(self.blocks)),
                f"decoder.{start + self.blocks + 1}.conv",
                self.in_time[level],
                f"decoder.{start + self.blocks + 2}",
                self.widths[level + 1],
            )
            for level, start in enumerate(starts)
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the decoder's tensors in a file."""
        named = _convolution(self.head, self.latent_channels, self.widths[0], bias=True)
        for level in self.levels:
            for block in level.blocks:
                named |= _convolution(f"{block}.conv.0", 2 * level.width, level.width, bias=True)
                named |= _convolution(f"{block}.conv.2", level.width, level.width, bias=True)
                named |= _convolution(f"{block}.conv.4", level.width, level.width, bias=True)
            named |= _convolution(level.grow, level.width, (1 + level.in_time) * level.width, side=1)
            named |= _convolution(level.up, level.width, level.width_above)
        return named | _convolution(self.last, self.widths[-1], _RGB, bias=True)

    def flops(self, rows: int, columns: int) -> int:
        """Operations of the convolutions for a latent in mid-stream; 1x1 ones are computed before the picture grows."""
        parameters = {name: math.prod(shape) for name, shape in self.tensors().items() if len(shape) > 1}
        pixels = rows * columns
        total = parameters[f"{self.head}.weight"] * pixels
        for level in self.levels:
            inside = (f"{block}.conv.{layer}" for block in level.blocks for layer in (0, 2, 4))
            total += sum(parameters[f"{name}.weight"] for name in (*inside, level.grow)) * pixels
            pixels *= 4 * (1 + level.in_time)
            total += parameters[f"{level.up}.weight"] * pixels
        return 2 * (total + parameters[f"{self.last}.weight"] * pixels)


class LightDecoder:
    """The weights of a TAEHV decoder, laid out as its convolutions read them.

    A memory block's first convolution sees a frame and the one before it, side by side in the channels: that is a
    causal convolution over two frames, and so it is kept. The last one's pixels, in [0, 1], are scaled to [-1, 1].

    Attributes:
        shape: sizes.
        normalised: whether it decodes latents as the network makes them, or with mean and deviation put back.
    """

    def __init__(self, shape: LightShape, tensors: Mapping[str, Tensor], normalised: bool) -> None:
        self.shape, self.normalised = shape, normalised
        self._tensors = tensors

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: torch.device, normalised: bool | None = None) -> Self:
        """Load the decoder of a `.safetensors` or `.pth` file.

        Args:
            path: the file.
            dtype: of the weights, and of what is computed with them.
            device: where they go.
            normalised: which latents the weights were made for; None: as the file's name says, since tensors do not.
                `taew2_1` takes them normalised (TAEHV's README: no latent scales or shifts); with `lighttae` in the
                name it takes the VAE's own, by which LightX2V, too, tells them (its `need_scaled`).

        Raises:
            CheckpointError: the file is missing or damaged, or holds no TAEHV decoder for Wan 2.1's latents.
        """
        return cls._of_state(path, _read(path), dtype, device, normalised)

    @classmethod
    def _of_state(
        cls,
        path: Path,
        state: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        normalised: bool | None = None,
    ) -> Self:
        found = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith("encoder.")}
        try:
            shape = LightShape.of_tensors(found)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        check_names_and_shapes(path, shape.tensors(), found)
        _check_wan21(path, shape)
        if normalised is None:
            normalised = _normalised_by_name(path)
        _log.info("%s: a TAEHV decoder of %s latents", path, "normalised" if normalised else "unnormalised")
        laid_out = {
            name: tensor.to(device, torch.float32 if name.endswith(".bias") else dtype)
            for name, tensor in _laid_out(shape, state).items()
        }
        return cls(shape, laid_out, normalised)

    @property
    def device(self) -> torch.device:
        return self.weight(self.shape.head).device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight(self.shape.head).dtype

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each latent channel, to be put back before decoding."""
        if not self.normalised:
            return LATENT_MEAN, LATENT_STD
        return (0.0,) * self.shape.latent_channels, (1.0,) * self.shape.latent_channels

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def weight(self, layer: str) -> Tensor:
        """[channels_out, kt, kh, kw, channels_in], contiguous."""
        return self._tensors[f"{layer}.weight"]

    def bias(self, layer: str) -> Tensor:
        """float32 [channels_out]."""
        return self._tensors[f"{layer}.bias"]


def load_decoder(path: Path, dtype: torch.dtype, device: torch.device) -> Vae | LightDecoder:
    """Load a decoder from a user's `.safetensors` or `.pth` file: of TAEHV's kind, or a Wan VAE's of any width.

    Which latents a TAEHV decoder takes follows from the file's name (`LightDecoder.load`); a Wan VAE's takes
    normalised ones, as the checkpoint's does. Of a Wan VAE, with or without its encoder in the file, the decoder is
    loaded and nothing else: the result does not encode.

    Raises:
        CheckpointError: the file is missing or damaged, or holds neither.
    """
    state = _read(path)
    if "decoder.conv1.weight" in state:
        return _wan_decoder(path, state, dtype, device)
    if f"decoder.{_HEAD}.weight" in state:
        return LightDecoder._of_state(path, state, dtype, device)
    raise CheckpointError(
        f"{path}: expected a TAEHV decoder (decoder.{_HEAD}.weight, decoder.{_FIRST_BLOCK}.conv.0.weight, ...) or a "
        f"Wan VAE's (decoder.conv1.weight, decoder.upsamples..., conv2.weight); it holds {listed(sorted(state)[:5])}"
    )


def _wan_decoder(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Vae:
    parts = {name: tensor for name, tensor in state.items() if not name.startswith(("encoder.", "conv1."))}
    found = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    try:
        shape = VaeShape.of_tensors(found)
        with torch.device("meta"):
            vae = Vae(shape).eval().requires_grad_(False)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    del vae.encoder, vae.conv1
    check_names_and_shapes(path, {name: tuple(t.shape) for name, t in vae.state_dict().items()}, found)
    for name, tensor in parts.items():
        assign(vae, name, tensor.to(device, dtype))
    return vae


def _read(path: Path) -> dict[str, Tensor]:
    return dict(TensorStore([path])) if path.suffix == ".safetensors" else read_pickle(path)


def _has_block(shapes: Shapes, number: int) -> bool:
    return f"decoder.{number}.conv.0.weight" in shapes


def _channels(shapes: Shapes, layer: str) -> tuple[int, int]:
    """Channels out and in of a 2-D convolution."""
    shape = shapes.get(f"{layer}.weight", ())
    if len(shape) != 4:
        raise CheckpointError(f"not the tensors of a TAEHV decoder: expected {layer}.weight, a 2-D convolution's")
    return shape[0], shape[1]


def _convolution(
    name: str, channels_in: int, channels_out: int, *, side: int = 3, bias: bool = False
) -> dict[str, tuple[int, ...]]:
    named: dict[str, tuple[int, ...]] = {f"{name}.weight": (channels_out, channels_in, side, side)}
    return named | {f"{name}.bias": (channels_out,)} if bias else named


def _check_wan21(path: Path, shape: LightShape) -> None:
    """That it decodes latents of Wan 2.1's size to frames of its size and rate."""
    for what, found, expected in (
        ("latent channels", shape.latent_channels, len(LATENT_MEAN)),
        ("frames per latent", shape.frames_per_latent, FRAMES_PER_STEP),
        ("pixels per latent, in height and width", shape.pixels_per_latent, LATENT_STRIDE),
    ):
        if found != expected:
            raise CheckpointError(f"{path}: a TAEHV decoder of another VAE: {found} {what}, Wan 2.1 has {expected}")


def _normalised_by_name(path: Path) -> bool:
    name = path.name.lower().replace(".", "_").replace("-", "_")
    if _UNNORMALISED in name:
        return False
    if _NORMALISED in name:
        return True
    raise CheckpointError(
        f"{path}: a TAEHV decoder, but tensors do not tell for which latents: its name must contain "
        f"{_NORMALISED!r} (Wan 2.1's, normalised) or {_UNNORMALISED!r} (LightX2V's, unnormalised)"
    )


def _laid_out(shape: LightShape, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's tensors for channels-last convolutions over time."""
    laid_out = {name: state[name] for name in shape.tensors()}
    both = {f"{block}.conv.0.weight" for level in shape.levels for block in level.blocks}
    for name, tensor in laid_out.items():
        if tensor.ndim > 1:
            # this frame and the one before it are neighbours in the channels; in time, the earlier one comes first
            frames = tensor.unflatten(1, (2, -1)).flip(1) if name in both else tensor[:, None]
            laid_out[name] = frames.permute(0, 1, 3, 4, 2).contiguous()
    weight, bias = f"{shape.last}.weight", f"{shape.last}.bias"
    laid_out[weight], laid_out[bias] = 2 * laid_out[weight], 2 * laid_out[bias].float() - 1
    return laid_out
