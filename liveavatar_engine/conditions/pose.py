"""Pose video conditioning: latents of the pose frames, clip by clip."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ..config import StreamGeometry
from ..config.geometry import LATENT_FRAME_STRIDE
from ..vae.vae import Vae
from .still import to_pixels

_BLACK = -1.0


class PoseStream:
    """Pose latents by block, read from a video as it is needed; black once the video has ended.

    Every clip is encoded by itself behind a copy of its first frame, whose latent is dropped, as the reference does.

    Args:
        frames: uint8 [height, width, 3] each, at 25 frames/s and in the stream's size.
    """

    def __init__(self, vae: Vae, frames: Iterator[np.ndarray], geometry: StreamGeometry) -> None:
        self._vae, self._frames, self._geometry = vae, frames, geometry
        self._clip_index = -1
        self._clip = torch.empty(0)
        self._black: Tensor | None = None

    def block(self, index: int) -> Tensor:
        """float32 [channels, frames_per_block, latent_height, latent_width]; blocks in order."""
        clip, within = divmod(index, self._geometry.blocks_per_clip)
        while self._clip_index < clip:
            self._clip = self._next_clip()
            self._clip_index += 1
        frames = self._geometry.frames_per_block
        return self._clip[:, within * frames : (within + 1) * frames]

    def _next_clip(self) -> Tensor:
        count = self._geometry.ring_frames * LATENT_FRAME_STRIDE
        pixels = [to_pixels(frame) for frame in islice(self._frames, count)]
        if not pixels and self._black is not None:
            return self._black
        black = torch.full((3, self._geometry.height, self._geometry.width), _BLACK)
        padded = pixels + [black] * (count - len(pixels))
        latents = torch.stack(list(self._vae.encode([padded[0], *padded]))[1:], dim=1)
        if not pixels:
            self._black = latents
        return latents
