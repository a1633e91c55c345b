"""What a portrait contributes: reference latent, motion latents and the decoder's priming."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
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

    What is returned holds no memory of the other latents.

    `pixels` is [3, height, width] in [-1, 1]. The defaults are the reference's block-wise pipeline.
    """
    reference_index, motion_count = (
        (frames - 1) // LATENT_FRAME_STRIDE for frames in (reference_frames, motion_source_frames)
    )
    latents = vae.encode_still(pixels, motion_count + 1)
    return StillConditions(
        reference=latents[:, reference_index : reference_index + 1].clone(),
        motion=latents[:, -MOTION_LATENTS:].clone(),
        priming=latents[:, :PRIMING_LATENTS].clone(),
    )


def to_pixels(image: np.ndarray) -> Tensor:
    """uint8 [height, width, 3] -> float32 [3, height, width] in [-1, 1]."""
    return torch.tensor(image).permute(2, 0, 1).float() / 255 * 2 - 1


class StillCache:
    """Conditions of the pictures that were used last, by what they show: opening with the same one encodes nothing."""

    def __init__(self, vae: Vae, pictures: int = 8) -> None:
        self._vae, self._pictures = vae, pictures
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, StillConditions] = OrderedDict()

    def conditions(self, pixels: Tensor, device: torch.device) -> StillConditions:
        """`still_conditions` of a picture on the CPU, encoded on `device` where it is not at hand."""
        digest = hashlib.sha256(repr(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes()).digest()
        with self._lock:
            found = self._kept.get(digest)
            if found is None:
                found = still_conditions(self._vae, pixels.to(device))
            self._kept[digest] = found
            self._kept.move_to_end(digest)
            while len(self._kept) > self._pictures:
                self._kept.popitem(last=False)
        return found
