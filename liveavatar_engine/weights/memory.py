"""How much device memory an engine needs, predicted from sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..conditions.audio_encoder import FEATURE_RATE
from ..conditions.audio_features import GLOBAL_SECONDS
from ..config import StreamGeometry
from ..config.geometry import LATENT_FRAME_STRIDE, LATENT_STRIDE
from ..denoise.caches import CacheArena
from ..model import Network
from ..vae.shape import VaeShape
from ..vae.vae import Vae
from .network import network_shapes

_WIDE = torch.float32.itemsize
_LOGIT_TILE = 1 << 28
"""Bytes of attention logits that are computed at a time in plain PyTorch."""
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

    Weights and caches are exact. Working memory is an estimate for the plain PyTorch path; CUDA's own context, the
    allocator's rounding and the workspaces of its libraries come on top.
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
    dtype: torch.dtype,
    steps: int,
    sessions: int,
    text_parameters: int = 0,
    audio_parameters: int = 0,
) -> MemoryEstimate:
    """Predict the memory of an engine that has `sessions` sessions open.

    Args:
        geometry: network and picture size.
        vae: its sizes; None leaves its rows out.
        dtype: the engine's.
        steps: denoise steps, each with a ring of its own.
        sessions: open at the same time.
        text_parameters, audio_parameters: of the encoders.
    """
    model = geometry.model
    arena = CacheArena(geometry, steps, sessions, dtype, torch.device("meta"))
    text_keys = 2 * model.num_layers * model.text_len * model.dim * dtype.itemsize
    states = GLOBAL_SECONDS * FEATURE_RATE * model.audio_layers * model.audio_dim * _WIDE
    modulation = steps * (6 * model.num_layers + 2) * model.dim * _WIDE
    rows = [
        MemoryRow("network", _network_bytes(geometry, dtype), "some parameters stay in float32"),
        MemoryRow("text encoder", text_parameters * dtype.itemsize),
        MemoryRow("audio encoder", audio_parameters * _WIDE, "float32"),
        MemoryRow("rings", 2 * math.prod(arena.ring_shape) * dtype.itemsize, f"{sessions} sessions x {steps} steps"),
        MemoryRow("sink", 2 * math.prod(arena.sink_shape) * dtype.itemsize, f"{sessions} sessions"),
        MemoryRow("text keys", sessions * text_keys, f"{sessions} sessions x {model.text_len} tokens"),
        MemoryRow("audio states", sessions * states, f"{sessions} sessions, at most {GLOBAL_SECONDS} s at once"),
        MemoryRow("time modulation", modulation, f"{steps} steps"),
    ]
    working = {"denoising": _denoise_bytes(geometry, dtype)}
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


def _network_bytes(geometry: StreamGeometry, dtype: torch.dtype) -> int:
    return sum(
        math.prod(shape) * (_WIDE if Network.keeps_float32(name) else dtype.itemsize)
        for name, shape in network_shapes(geometry.model).items()
    )


def _vae_bytes(shape: VaeShape, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        vae = Vae(shape)
    decoder = sum(p.numel() for part in (vae.decoder, vae.conv2) for p in part.parameters())
    encoder = sum(p.numel() for p in vae.parameters()) - decoder
    return decoder * dtype.itemsize + encoder * _WIDE


def _denoise_bytes(geometry: StreamGeometry, dtype: torch.dtype) -> int:
    """Most that is alive in a step, in self-attention.

    Eight float32 copies of the block's tokens, float32 copies of all keys and values where they are narrower, and
    three tiles of logits.
    """
    model, block = geometry.model, geometry.tokens_per_block
    keys = geometry.ring_tokens + geometry.sink_tokens
    widened = 0 if dtype.itemsize >= _WIDE else 2 * keys * model.dim * _WIDE
    logits = model.num_heads * block * keys * _WIDE
    return 8 * block * model.dim * _WIDE + widened + min(3 * _LOGIT_TILE, 2 * logits)


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
