"""Audio injection: after some layers, each frame's tokens attend to that frame's audio tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import CachedCrossAttention, KeyValue
from .audio_tokens import AudioTokens
from .linear import input_dtype
from .residual import Residual

_ADALN_EPS = 1e-5
_ADALN_ROWS = 2
"""Shift and scale."""


@dataclass(frozen=True)
class AudioInputs:
    """What the injectors read of some frames' audio; it does not depend on the step.

    Attributes:
        packed: [injectors, actors, frames, rows, dim]; the rows are keys, as many values, shift and scale.
        view: int32 [frames, 3], made by `frame_view`.
    """

    packed: Tensor
    view: Tensor

    def of_actor(self, injector: int, actor: int, heads: int) -> tuple[KeyValue, Tensor, Tensor]:
        """Keys and values [frames, audio_tokens, heads, head_dim], shift and scale [frames, dim]."""
        rows = self.packed[injector, actor]
        tokens = (rows.shape[1] - _ADALN_ROWS) // 2
        k, v = (part.unflatten(-1, (heads, -1)) for part in (rows[:, :tokens], rows[:, tokens : 2 * tokens]))
        return KeyValue(k, v), rows[:, -2], rows[:, -1]


def frame_view(frames: int, audio_tokens: int) -> Tensor:
    """The view that `cross_attention` takes, on the CPU: every frame reads the tokens of its own."""
    return torch.tensor([[frame, audio_tokens, 0] for frame in range(frames)], dtype=torch.int32)


class AdaptiveNorm(nn.Module):
    """Projects an embedding to the shift and scale of a LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def shift_scale(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """[..., dim] -> shift and scale, [..., dim] each."""
        shift, scale = self.linear(F.silu(embedding)).chunk(2, dim=-1)
        return shift, scale


class AudioInjector(nn.Module):
    """The injectors of a network; injector i follows the i-th of `layers`."""

    def __init__(self, layers: tuple[int, ...], dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.index_of_layer = {layer: index for index, layer in enumerate(layers)}
        self.injector = nn.ModuleList(CachedCrossAttention(dim, heads, eps) for _ in layers)
        self.injector_adain_layers = nn.ModuleList(AdaptiveNorm(dim) for _ in layers)

    def rows(self, audio_tokens: int) -> int:
        """Rows of `AudioInputs.packed` for so many tokens that a frame reads."""
        return 2 * audio_tokens + _ADALN_ROWS

    def prepare(self, tokens: AudioTokens) -> Tensor:
        """Everything the injectors need for a block, computed once per block: `AudioInputs.packed`."""
        packed = []
        for injector, norm in zip(self.injector, self.injector_adain_layers, strict=True):
            assert isinstance(injector, CachedCrossAttention)
            assert isinstance(norm, AdaptiveNorm)
            dtype = injector.norm_q.weight.dtype
            shift, scale = norm.shift_scale(tokens.global_token.to(dtype))
            context = injector.key_value(tokens.local_tokens.to(dtype))
            rows = (context.k.flatten(-2), context.v.flatten(-2), shift[..., None, :], scale[..., None, :])
            packed.append(torch.cat(rows, dim=-2))
        return torch.stack(packed)

    def forward(self, stream: Residual, layer: int, audio: AudioInputs, mask: Tensor | None) -> Residual:
        """Add the injection that follows `layer`, if any, to the stream, [tokens, dim].

        `mask` is [actors, frames, tokens_per_frame, 1]; each actor's result is multiplied by it; they are summed.
        The adaptive norm feeds only the query; the result is added to the stream as it is.
        """
        index = self.index_of_layer.get(layer)
        if index is None:
            return stream
        injector = self.injector[index]
        assert isinstance(injector, CachedCrossAttention)
        dtype = injector.norm_q.weight.dtype
        injected: Tensor | None = None
        for actor in range(audio.packed.shape[1]):
            context, shift, scale = audio.of_actor(index, actor, injector.heads)
            stream, normed = stream.normed(_ADALN_EPS, input_dtype(injector.q, dtype), dtype, shift=shift, scale=scale)
            branch = injector(normed, context, audio.view)
            if mask is not None:
                branch = branch * mask[actor].flatten(0, 1)
            injected = branch if injected is None else injected + branch
        assert injected is not None
        return stream.plus(injected)
