"""Audio injection: after some layers, each frame's tokens attend to that frame's audio tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from .attention import CachedCrossAttention, KeyValue
from .audio_tokens import AudioTokens
from .linear import input_dtype
from .residual import Residual

_ADALN_EPS = 1e-5


@dataclass(frozen=True)
class InjectorInput:
    """What one injector reads for a block; it depends on the block's audio only, not on the step.

    Attributes:
        context: keys and values, [actors, frames, audio_tokens, heads, head_dim].
        shift, scale: of the adaptive norm, [actors, frames, dim].
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
            dtype = injector.norm_q.weight.dtype
            shift, scale = norm.shift_scale(tokens.global_token.to(dtype))
            context = injector.key_value(tokens.local_tokens.to(dtype))
            inputs.append(InjectorInput(context, shift, scale))
        return inputs

    def forward(self, stream: Residual, layer: int, inputs: list[InjectorInput], mask: Tensor | None) -> Residual:
        """Add the injection that follows `layer`, if any, to the stream, [tokens, dim].

        `mask` is [actors, frames or 1, tokens_per_frame, 1]; each actor's result is multiplied by it; they are summed.
        The adaptive norm feeds only the query; the result is added to the stream as it is.
        """
        index = self.index_of_layer.get(layer)
        if index is None:
            return stream
        injector, audio = self.injector[index], inputs[index]
        assert isinstance(injector, CachedCrossAttention)
        dtype = injector.norm_q.weight.dtype
        injected: Tensor | None = None
        for actor, (k, v, shift, scale) in enumerate(
            zip(audio.context.k, audio.context.v, audio.shift, audio.scale, strict=True)
        ):
            stream, normed = stream.normed(_ADALN_EPS, input_dtype(injector.q, dtype), dtype, shift=shift, scale=scale)
            branch = injector(normed, KeyValue(k, v))
            if mask is not None:
                by_frame = branch.unflatten(0, (len(shift), -1))
                branch = (by_frame * mask[actor].to(branch.dtype)).flatten(0, 1)
            injected = branch if injected is None else injected + branch
        assert injected is not None
        return stream.plus(injected)
