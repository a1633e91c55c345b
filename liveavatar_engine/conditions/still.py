"""What a portrait contributes: reference latent, motion latents and the decoder's priming."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config.geometry import LATENT_FRAME_STRIDE, MOTION_LATENTS
from ..vae.vae import Vae

REFERENCE_FRAMES = 5
"""Times the image is repeated for the reference latent, which is the last of these frames' latents."""
MOTION_SOURCE_FRAMES = 365
"""Times the image is repeated for the motion latents."""
PRIMING_LATENTS = 7
"""First motion latents, which run through the decoder before the stream's own; their frames are dropped."""


@dataclass(frozen=True)
class StillConditions:
    """Latents of the image, float32 [channels, frames, latent_height, latent_width] each.

    Attributes:
        reference: one frame, for the sink.
        motion: 19 frames, oldest first, for the sink.
        priming: 7 frames, for the decoder.
    """

    reference: Tensor
    motion: Tensor
    priming: Tensor


def still_conditions(
    vae: Vae,
    pixels: Tensor,
    reference_frames: int = REFERENCE_FRAMES,
    motion_source_frames: int = MOTION_SOURCE_FRAMES,
) -> StillConditions:
    """Encode an image that stands still, once: the encoder is causal, so shorter repetitions are beginnings of longer.

    `pixels` is [3, height, width] in [-1, 1]. The defaults are the reference's block-wise pipeline.
    """
    reference_index, motion_count = (
        (frames - 1) // LATENT_FRAME_STRIDE for frames in (reference_frames, motion_source_frames)
    )
    latents = vae.encode_still(pixels, motion_count + 1)
    return StillConditions(
        reference=latents[:, reference_index : reference_index + 1],
        motion=latents[:, -MOTION_LATENTS:],
        priming=latents[:, :PRIMING_LATENTS],
    )


def to_pixels(image: np.ndarray) -> Tensor:
    """uint8 [height, width, 3] -> float32 [3, height, width] in [-1, 1]."""
    return torch.tensor(image).permute(2, 0, 1).float() / 255 * 2 - 1
