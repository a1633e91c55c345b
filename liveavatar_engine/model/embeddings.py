"""Patch, time and text embeddings, and the output head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .norms import wide_dtype
from .residual import Residual
from .sequence import TokenSplit


class PatchEmbedding(nn.Conv3d):
    """Latents to tokens: one token per `patch` of latents."""

    def __init__(self, channels: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__(channels, dim, kernel_size=patch, stride=patch)

    def tokens(self, latents: Tensor) -> Tensor:
        """[channels, frames, height, width] -> [tokens, dim], tokens in (frame, row, column) order.

        Trailing rows and columns that do not fill a patch are left out.
        """
        return self(latents.to(self.weight.dtype)[None])[0].flatten(1).transpose(0, 1).contiguous()


def sinusoid(position: Tensor, freq_dim: int) -> Tensor:
    """cos | sin of position * 10000^(-i / half), in float64: scalar -> [freq_dim]."""
    half = freq_dim // 2
    frequencies = 10_000.0 ** -(torch.arange(half, dtype=torch.float64, device=position.device) / half)
    angles = position.double() * frequencies
    return torch.cat((angles.cos(), angles.sin()))


def time_embedding(freq_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))


def time_projection(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))


def text_embedding(text_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))


class Head(nn.Module):
    """Tokens to the velocity of their latents, in float32."""

    def __init__(self, dim: int, channels: int, patch: tuple[int, int, int], eps: float) -> None:
        super().__init__()
        self.channels, self.patch, self.eps = channels, patch, eps
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))
        self.head = nn.Linear(dim, patch[0] * patch[1] * patch[2] * channels)

    def forward(
        self,
        stream: Residual,
        shift: Tensor,
        scale: Tensor,
        grid: tuple[int, int, int],
        dtype: torch.dtype,
        split: TokenSplit,
    ) -> Tensor:
        """Stream [tokens, dim], rounded to the model's `dtype` -> [channels, frames, height, width] in float32.

        The stream has this rank's tokens, the result those of all ranks. A token holds its patch in (frame, row,
        column, channel) order, the channel fastest. `shift` and `scale`, [groups, dim] each, are the learned modulation
        plus the time embedding itself.
        """
        _, normed = stream.normed(self.eps, wide_dtype(dtype), dtype, shift=shift, scale=scale)
        patches = split.whole(self.head(normed))
        frames, rows, columns = grid
        p, q, r = self.patch
        patches = patches.view(frames, rows, columns, p, q, r, self.channels)
        return patches.permute(6, 0, 3, 1, 4, 2, 5).reshape(self.channels, frames * p, rows * q, columns * r)
