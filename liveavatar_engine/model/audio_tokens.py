"""Audio token encoder: wav2vec2 states of a block to a few tokens per latent frame, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_KERNEL = 3
_EPS = 1e-6


@dataclass(frozen=True)
class AudioTokens:
    """Tokens of one block, float32.

    Attributes:
        local_tokens: [actors, frames, num_audio_token + 1, dim], what cross-attention reads.
        global_token: [actors, frames, dim], what drives the adaptive norm.
    """

    local_tokens: Tensor
    global_token: Tensor


class CausalConv1d(nn.Module):
    """Convolution over time that repeats the first column for what lies before it."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels_in, channels_out, _KERNEL, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, channels_in] -> [batch, ceil(time / stride), channels_out]."""
        padded = F.pad(x.transpose(1, 2), (_KERNEL - 1, 0), mode="replicate")
        return self.conv(padded).transpose(1, 2)


class TokenConvolutions(nn.Module):
    """Two paths of three causal convolutions, the later two shared; time shrinks fourfold."""

    def __init__(self, audio_dim: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.conv1_local = CausalConv1d(audio_dim, dim // 4 * tokens)
        self.conv1_global = CausalConv1d(audio_dim, dim // 4)
        self.conv2 = CausalConv1d(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConv1d(dim // 2, dim, stride=2)
        self.final_linear = nn.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.empty(1, 1, 1, dim))

    def forward(self, x: Tensor) -> AudioTokens:
        """[actors, time, audio_dim] -> tokens of ceil(ceil(time / 2) / 2) latent frames."""
        actors = x.shape[0]
        local = self.conv1_local(x).unflatten(-1, (self.tokens, -1)).transpose(1, 2).flatten(0, 1)
        local = self._shared(local).unflatten(0, (actors, self.tokens)).transpose(1, 2)
        padding = self.padding_tokens.expand(actors, local.shape[1], -1, -1)
        return AudioTokens(
            local_tokens=torch.cat((local, padding), dim=2),
            global_token=self.final_linear(self._shared(self.conv1_global(x))),
        )

    def _shared(self, x: Tensor) -> Tensor:
        for convolution in (self.conv2, self.conv3):
            x = convolution(_norm_silu(x))
        return _norm_silu(x)


class CausalAudioEncoder(nn.Module):
    """Averages the encoder's hidden states with learned weights and turns the block's columns into tokens.

    `context_columns` copies of the block's first column stand before it, and the `context_frames` latent frames that
    come out of them are dropped: the reference fills the span of the motion frames so.
    """

    def __init__(
        self, audio_dim: int, dim: int, layers: int, tokens: int, context_columns: int, context_frames: int
    ) -> None:
        super().__init__()
        self.context_columns, self.context_frames = context_columns, context_frames
        self.weights = nn.Parameter(torch.empty(1, layers, 1, 1))
        self.encoder = TokenConvolutions(audio_dim, dim, tokens)

    def forward(self, states: Tensor) -> AudioTokens:
        """[actors, layers, audio_dim, columns] -> tokens of the block's latent frames."""
        weights = F.silu(self.weights)
        columns = (states.to(weights.dtype) * weights / weights.sum(dim=1, keepdim=True)).sum(dim=1).transpose(1, 2)
        before = columns[:, :1].expand(-1, self.context_columns, -1)
        tokens = self.encoder(torch.cat((before, columns), dim=1))
        return AudioTokens(tokens.local_tokens[:, self.context_frames :], tokens.global_token[:, self.context_frames :])


def _norm_silu(x: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=_EPS))
