"""How much device memory an engine needs, predicted from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..conditions.audio_encoder import FEATURE_RATE
from ..conditions.audio_features import GLOBAL_SECONDS
from ..config import StreamGeometry
from ..config.geometry import LATENT_FRAME_STRIDE, LATENT_STRIDE
from ..denoise.caches import CacheArena
from ..model.quantize import linears_to_quantize
from ..pipeline.device import Precision
from ..vae.shape import VaeShape
from ..vae.vae import Vae
from .network import empty_network

_WIDE, _E4M3 = torch.float32.itemsize, 1
_LOGIT_TILE = 1 << 28
"""Bytes of attention logits that are computed at a time in plain PyTorch."""
_STEP_COPIES = 11
"""Copies of a block's tokens in the model's dtype that are alive at once in a step, measured."""
_PAST_FRAMES = 2
"""Frames that a causal convolution of the VAE keeps."""
_DECODE_LAYERS, _ENCODE_LAYERS = 5, 12
"""Outputs of the VAE's widest layer that are alive at once, measured; the encoder's include its own history."""


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one kind, and what they depend on."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class MemoryEstimate:
    """Device memory by what holds it.

    Weights and caches are exact. Working memory is an estimate; CUDA's own context, the allocator's rounding and the
    workspaces of its libraries come on top.
    """

    rows: tuple[MemoryRow, ...]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(row.bytes for row in self.rows)

    def __getitem__(self, name: str) -> int:
        """Bytes of the row of that name."""
        return {row.name: row.bytes for row in self.rows}[name]


def predict_memory(
    geometry: StreamGeometry,
    vae: VaeShape | None,
    *,
    precision: Precision,
    steps: int,
    sessions: int,
    text_parameters: int = 0,
    audio_parameters: int = 0,
    plain_attention: bool = False,
) -> MemoryEstimate:
    """Predict the memory of an engine that has `sessions` sessions open.

    Args:
        geometry: network and picture size.
        vae: its sizes; None leaves its rows out.
        precision: the engine's.
        steps: denoise steps, each with a ring of its own.
        sessions: open at the same time.
        text_parameters, audio_parameters: of the encoders.
        plain_attention: whether attention runs in plain PyTorch, as on a CPU.
    """
    model, dtype = geometry.model, precision.dtype
    arena = CacheArena(geometry, steps, sessions, precision.cache, torch.device("meta"))
    text_keys = 2 * model.num_layers * model.text_len * model.dim * dtype.itemsize
    states = GLOBAL_SECONDS * FEATURE_RATE * model.audio_layers * model.audio_dim * _WIDE
    modulation = steps * (6 * model.num_layers + 2) * model.dim * _WIDE
    rows = [
        MemoryRow("network", _network_bytes(geometry, precision), "some parameters stay in float32"),
        MemoryRow("text encoder", text_parameters * dtype.itemsize),
        MemoryRow("audio encoder", audio_parameters * _WIDE, "float32"),
        MemoryRow("rings", arena.ring_bytes, f"{sessions} sessions x {steps} steps"),
        MemoryRow("sink", arena.sink_bytes, f"{sessions} sessions"),
        MemoryRow("text keys", sessions * text_keys, f"{sessions} sessions x {model.text_len} tokens"),
        MemoryRow("audio states", sessions * states, f"{sessions} sessions, at most {GLOBAL_SECONDS} s at once"),
        MemoryRow("time modulation", modulation, f"{steps} steps"),
    ]
    working = {"denoising": _denoise_bytes(geometry, dtype, plain_attention)}
    if vae is not None:
        pixels = geometry.height * geometry.width
        history = sessions * _decoder_history(vae, pixels) * dtype.itemsize
        rows.insert(3, MemoryRow("VAE", _vae_bytes(vae, dtype), "the encoder is float32"))
        rows.append(MemoryRow("VAE history", history, f"{sessions} sessions"))
        layer = LATENT_FRAME_STRIDE * pixels * vae.widths[0]
        frames = 2 * geometry.columns_per_block * 3 * pixels * _WIDE
        working["decoding"] = _DECODE_LAYERS * layer * dtype.itemsize + frames
        working["encoding the image"] = _ENCODE_LAYERS * layer * _WIDE
    largest = max(working, key=lambda name: working[name])
    rows.append(MemoryRow("working memory", working[largest], f"estimate; most for {largest}"))
    return MemoryEstimate(tuple(rows))


def _network_bytes(geometry: StreamGeometry, precision: Precision) -> int:
    network = empty_network(geometry.model)
    quantized = {} if precision.fp8_skip is None else linears_to_quantize(network, precision.fp8_skip)
    scales = sum(layer.out_features * _WIDE for layer in quantized.values())
    weights = {f"{name}.weight" for name in quantized}

    def itemsize(name: str) -> int:
        if name in weights:
            return _E4M3
        return _WIDE if network.keeps_float32(name) else precision.dtype.itemsize

    return scales + sum(tensor.numel() * itemsize(name) for name, tensor in network.state_dict().items())


def _vae_bytes(shape: VaeShape, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        vae = Vae(shape)
    decoder = sum(p.numel() for part in (vae.decoder, vae.conv2) for p in part.parameters())
    encoder = sum(p.numel() for p in vae.parameters()) - decoder
    return decoder * dtype.itemsize + encoder * _WIDE


def _denoise_bytes(geometry: StreamGeometry, dtype: torch.dtype, plain_attention: bool) -> int:
    """Most that is alive in a step, in cross-attention; attention in plain PyTorch comes on top.

    That makes float32 copies of all keys and values where they are narrower, and three tiles of logits.
    """
    model, block = geometry.model, geometry.tokens_per_block
    alive = block * model.dim * (_STEP_COPIES * dtype.itemsize + _WIDE)
    if not plain_attention:
        return alive
    keys = geometry.ring_tokens + geometry.sink_tokens
    widened = 0 if dtype.itemsize >= _WIDE else 2 * keys * model.dim * _WIDE
    logits = model.num_heads * block * keys * _WIDE
    return alive + widened + min(3 * _LOGIT_TILE, 2 * logits)


def _decoder_history(shape: VaeShape, pixels: int) -> int:
    """Values that the decoder's causal convolutions keep: two frames of the input of each."""
    widths, in_time = shape.widths[::-1], shape.in_time[::-1]
    channels = widths[0]
    area = pixels // LATENT_STRIDE**2
    values = area * (shape.latent_channels + 4 * channels)
    for level, width in enumerate(widths):
        values += area * (channels + (2 * shape.blocks + 1) * width)
        channels = width
        if level < len(in_time):
            values += area * channels if in_time[level] else 0
            channels, area = channels // 2, 4 * area
    return _PAST_FRAMES * (values + area * channels)
