"""Audio injection: after some layers, each frame's tokens attend to that frame's audio tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from .attention import CachedCrossAttention, KeyValue
from .audio_tokens import AudioTokens
from .norms import modulated_norm

_ADALN_EPS = 1e-5


@dataclass(frozen=True)
class InjectorInput:
    """What one injector reads for a block; it depends on the block's audio only, not on the step.

    Attributes:
        context: keys and values, [actors, frames, audio_tokens, heads, head_dim].
        shift, scale: of the adaptive norm, [actors, frames, 1, dim].
    """

    context: KeyValue
    shift: Tensor
    scale: Tensor


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

    def prepare(self, tokens: AudioTokens) -> list[InjectorInput]:
        """Everything the injectors need for a block, computed once per block; one entry per injector."""
        inputs = []
        for injector, norm in zip(self.injector, self.injector_adain_layers, strict=True):
            assert isinstance(injector, CachedCrossAttention)
            assert isinstance(norm, AdaptiveNorm)
            dtype = injector.q.weight.dtype
            shift, scale = norm.shift_scale(tokens.global_token.to(dtype))
            context = injector.key_value(tokens.local_tokens.to(dtype))
            inputs.append(InjectorInput(context, shift[:, :, None], scale[:, :, None]))
        return inputs

    def forward(self, x: Tensor, layer: int, inputs: list[InjectorInput], mask: Tensor | None) -> Tensor:
        """Add the injection that follows `layer`, if any: [tokens, dim] -> [tokens, dim].

        `mask` is [actors, frames, tokens_per_frame, 1]; each actor's result is multiplied by it, and they are summed.
        The adaptive norm feeds only the query; the result is added to the stream as it is.
        """
        index = self.index_of_layer.get(layer)
        if index is None:
            return x
        audio = inputs[index]
        frames = audio.shift.shape[1]
        normed = modulated_norm(x.unflatten(0, (frames, -1)), audio.shift, audio.scale, _ADALN_EPS, x.dtype)
        injected = self.injector[index](normed, audio.context)
        if mask is not None:
            injected = injected * mask.to(injected.dtype)
        return x + injected.sum(dim=0).flatten(0, 1)
