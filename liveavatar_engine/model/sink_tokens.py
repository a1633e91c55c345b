"""Tokens of the sink: packed motion latents and the reference image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config.geometry import MOTION_BUCKETS, MOTION_LATENTS
from .embeddings import PatchEmbedding


class FramePacker(nn.Module):
    """Packs the motion latents into ever larger patches, from the newest to the oldest."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        newest, middle, oldest = MOTION_BUCKETS
        self.proj = PatchEmbedding(channels, dim, newest.stride)
        self.proj_2x = PatchEmbedding(channels, dim, middle.stride)
        self.proj_4x = PatchEmbedding(channels, dim, oldest.stride)

    def forward(self, latents: Tensor) -> Tensor:
        """[channels, frames, height, width], oldest first -> [tokens, dim], newest first.

        Only the newest 19 frames count; where there are fewer, zeros stand in for older ones.
        """
        missing = max(0, MOTION_LATENTS - latents.shape[1])
        padding = latents.new_zeros(latents.shape[0], missing, *latents.shape[2:])
        latents = torch.cat((padding, latents), dim=1)
        tokens, end = [], latents.shape[1]
        for bucket, pack in zip(MOTION_BUCKETS, (self.proj, self.proj_2x, self.proj_4x), strict=True):
            tokens.append(pack.tokens(latents[:, end - bucket.latents : end]))
            end -= bucket.latents
        return torch.cat(tokens)
