"""Operations that a step and a decode need, and the least memory traffic: from sizes alone, whatever is really done.

An operation is a multiplication or an addition of a product; norms, activations and softmax count as none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..config import StreamGeometry
from ..vae.shape import VaeShape
from ..vae.vae import Vae
from .kernels.rows import Limits
from .kernels.timing import Ceilings
from .results import Stage

QKV, ATTENTION_OUTPUT = "self-attention qkv", "self-attention output"
CROSS_QUERY, CROSS_OUTPUT = "cross-attention q", "cross-attention output"
FFN_UP, FFN_DOWN = "ffn up", "ffn down"
RING_WRITE, RING_ATTENTION = "ring write", "ring attention"
TEXT_ATTENTION, AUDIO_INJECTION = "text cross-attention", "audio injection"
NORMS, QUANTISE = "norms and residuals", "quantise"
ENDS, EULER, REMAINDER = "embedding and head", "euler", "remainder"
LINEARS = (QKV, ATTENTION_OUTPUT, CROSS_QUERY, CROSS_OUTPUT, FFN_UP, FFN_DOWN)
STEP_STAGES = (*LINEARS, RING_WRITE, RING_ATTENTION, TEXT_ATTENTION, AUDIO_INJECTION, NORMS, QUANTISE, ENDS, EULER)
"""Stages of a denoise step, in the order in which reports show them; REMAINDER comes last."""
_WIDE = 4


@dataclass(frozen=True)
class Work:
    """What a stage needs.

    Attributes:
        flops: operations.
        bytes: least traffic; None where it is not modelled.
        e4m3: whether its products are in e4m3.
    """

    flops: float
    bytes: float | None = None
    e4m3: bool = False


@dataclass(frozen=True)
class Widths:
    """Bytes of a number: of activations, linear weights and what they read, ring and sink."""

    activation: int
    weight: int
    cache: int

    @property
    def e4m3_linears(self) -> bool:
        return self.weight == 1


def step_work(
    geometry: StreamGeometry, text_keys: int, actors: int = 1, widths: Widths | None = None
) -> dict[str, Work]:
    """Stage -> work of one step of one block with a full ring and the whole sink.

    Args:
        geometry: network and picture size.
        text_keys: keys that a token reads in text cross-attention; text_len, or a prompt's tokens and one key for the
            padding.
        actors: whose audio is injected.
        widths: of numbers; bf16 for everything if None.
    """
    model, tokens = geometry.model, geometry.tokens_per_block
    dim, layers, injectors = model.dim, model.num_layers, len(model.injector_layers)
    widths = widths or Widths(2, 2, 2)
    keys = geometry.ring_tokens + geometry.sink_tokens
    audio_keys = model.num_audio_token + 1
    a, c = widths.activation, widths.cache
    token = tokens * dim

    def linear(inner: int, outer: int, count: int = layers) -> Work:
        moved = (tokens + outer) * inner * widths.weight + tokens * outer * a
        return Work(2.0 * tokens * inner * outer * count, float(moved * count), widths.e4m3_linears)

    def attention(seen: int, count: int, width: int) -> Work:
        moved = 2 * token * a + 2 * seen * dim * width
        return Work(4.0 * token * seen * count, float(moved * count))

    quantised = layers * tokens * (2 * dim + model.ffn_dim) * (a + 1) if widths.e4m3_linears else 0
    normed = widths.weight if widths.e4m3_linears else a
    # before self-attention the branch of the layer before is added, in front of the others that of this one
    norms = layers * token * ((_WIDE + 2 * a + normed) + (2 * a + _WIDE + normed) + (_WIDE + a + _WIDE + normed))
    injected = linear(dim, dim, 2 * injectors * actors)
    heard = attention(audio_keys, injectors * actors, a)
    adaptive = injectors * actors * token * (_WIDE + 2 * a + normed)
    patch = model.in_dim * model.patch_size[0] * model.patch_size[1] * model.patch_size[2]
    values = tokens * patch
    ring = attention(keys, layers, c)
    return {
        QKV: linear(dim, 3 * dim),
        ATTENTION_OUTPUT: linear(dim, dim),
        CROSS_QUERY: linear(dim, dim),
        CROSS_OUTPUT: linear(dim, dim),
        FFN_UP: linear(dim, model.ffn_dim),
        FFN_DOWN: linear(model.ffn_dim, dim),
        RING_WRITE: Work(0.0, float(layers * token * (4 * a + 2 * c))),
        RING_ATTENTION: Work(ring.flops, ring.bytes, c == 1),
        TEXT_ATTENTION: attention(text_keys, layers, a),
        AUDIO_INJECTION: Work(
            injected.flops + heard.flops, (injected.bytes or 0) + (heard.bytes or 0) + adaptive, widths.e4m3_linears
        ),
        NORMS: Work(0.0, float(norms)),
        QUANTISE: Work(0.0, float(quantised)),
        ENDS: Work(4.0 * values * dim, float(3 * token * a + token * _WIDE + 2 * values * _WIDE)),
        EULER: Work(0.0, float(3 * values * _WIDE)),
    }


def total(works: Mapping[str, Work]) -> float:
    """Operations of all stages together."""
    return sum(work.flops for work in works.values())


def decode_flops(shape: VaeShape, geometry: StreamGeometry) -> float:
    """Operations that the VAE needs for a block in mid-stream, counted on tensors without storage."""
    with torch.device("meta"), torch.inference_mode():
        stream = Vae(shape).eval().requires_grad_(False).decoder_stream()
        block = torch.zeros(geometry.block_shape)
        stream.decode(block)
        with FlopCounterMode(display=False) as counter:
            stream.decode(block)
    return float(counter.get_total_flops())


def stage(
    name: str,
    ms: float,
    calls: float,
    work: Work | None,
    limits: Limits | None,
    ceilings: Ceilings | None,
    per_block: bool = False,
) -> Stage:
    """A stage that took `ms`, with what follows from its work."""
    if work is None or ms <= 0:
        return Stage(name, ms, calls, per_block)
    allowed = None if limits is None else _least_ms(work, limits.bf16, limits.e4m3, limits.memory)
    reached = None
    if ceilings is not None:
        e4m3 = ceilings.e4m3_tflops
        reached = _least_ms(work, ceilings.matmul_tflops, e4m3, ceilings.copy_gbps)
    return Stage(
        name,
        ms,
        calls,
        per_block,
        work.flops or None,
        work.bytes or None,
        work.flops / ms / 1e9 or None,
        None if not work.bytes else work.bytes / ms / 1e6,
        None if not allowed else allowed / ms,
        None if not reached else reached / ms,
    )


def _least_ms(work: Work, dense_tflops: float, e4m3_tflops: float | None, gbps: float) -> float | None:
    """Milliseconds that work takes at some limits: of products or of memory, whichever is longer."""
    tflops = e4m3_tflops if work.e4m3 else dense_tflops
    if tflops is None:
        return None
    return max(work.flops / tflops / 1e9, (work.bytes or 0.0) / gbps / 1e6)
