"""From audio to frames on their way: what a session does for each of its chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..conditions.audio_features import Features
from ..conditions.pose import PoseStream
from ..config import StreamGeometry
from ..config.geometry import LATENT_FRAME_STRIDE
from ..denoise.noise import BlockNoise
from ..denoise.stream import LatentStream
from ..frames import FrameChunk
from ..runtime.timing import StageTimer
from ..vae.delivery import FrameDecoder, Pending
from .runner import Ending

PORTRAIT_FRAMES = LATENT_FRAME_STRIDE - 1
"""Frames at the head of a stream that still show the portrait and are dropped, as in the reference."""


@dataclass(frozen=True)
class ProductionParts:
    """What chunks are made with.

    Attributes:
        early_first_frame: whether the first latent's frames are a chunk of their own, which need not wait for the rest
            of the first block.
        overlap: whether the next block is begun, if its audio is there, while the frames of the last one are on their
            way.
    """

    geometry: StreamGeometry
    features: Features
    noise: BlockNoise
    latents: LatentStream
    decoder: FrameDecoder
    pose: PoseStream | None
    early_first_frame: bool = False
    overlap: bool = False


@dataclass(frozen=True)
class _Part:
    """Frames of a chunk that have been asked for, and the latents that they come from."""

    block: int
    first_latent: int
    latents: Tensor
    pending: Pending
    timer: StageTimer


class Production:
    """Makes the chunks of a stream, in order, on one device.

    Args:
        parts: what they are made with.
        max_blocks: after which the stream ends, or None.
        release: lets go of the parts.
        ending: of the engine.
    """

    def __init__(
        self,
        parts: ProductionParts,
        max_blocks: int | None,
        release: Callable[[], None],
        ending: Ending | None = None,
    ) -> None:
        self.parts, self.max_blocks = parts, max_blocks
        self.geometry, self.features = parts.geometry, parts.features
        self.change_prompt, self.close = parts.latents.change_prompt, release
        self._ending = ending or Ending()
        self._taken = self._decoded = 0
        self._finished: deque[Tensor] = deque()
        self._coming: deque[_Part] = deque()
        self._timer = StageTimer(parts.latents.device)

    def next(self, closed: Callable[[], bool]) -> tuple[FrameChunk, Tensor] | None:
        """The next chunk and its latents; None behind the last one, or when nothing has been begun once `closed`.

        Raises:
            SessionError: the engine has been closed.
        """
        self._ending.check()
        if not self._coming:
            while not self._finished and not closed():
                if not self._take_block(closed):
                    with self._timer.stage("denoise"):
                        self._finished.extend(self.parts.latents.drain())
                    break
            if not self._finished:
                return None
            self._decode(self._finished.popleft())
            if self.parts.overlap and not self._finished and self.parts.features.ready(self._taken):
                self._take_block(closed)
            self.parts.noise.prepare(self._taken)
        part = self._coming.popleft()
        return self._chunk(part, part.pending.wait()), part.latents

    def _take_block(self, closed: Callable[[], bool]) -> bool:
        """Begin the next block; False when there is none."""
        parts, index = self.parts, self._taken
        if index == self.max_blocks or self._ending.draining.is_set():
            return False
        with self._timer.stage("audio"):
            states = parts.features.block(index)
        if states is None or closed():
            return False
        with self._timer.stage("denoise"):
            pose = None if parts.pose is None else parts.pose.block(index)
            self._finished.extend(parts.latents.push(parts.noise.block(index), states, pose))
        self._taken += 1
        return True

    def _decode(self, latents: Tensor) -> None:
        """Start to decode a block's latents."""
        timer, self._timer = self._timer, StageTimer(self.parts.latents.device)
        early, start = self.parts.early_first_frame, 0
        for count in parts_of(latents.shape[1], self._decoded, self.features.columns, early):
            piece = latents[:, start : start + count]
            pending = self.parts.decoder.start(piece, timer)
            self._coming.append(_Part(self._decoded, start, piece, pending, timer))
            start += count
            timer = StageTimer(self.parts.latents.device)
        self._decoded += 1

    def _chunk(self, part: _Part, frames: np.ndarray | Tensor) -> FrameChunk:
        start, columns = (part.block, part.first_latent), self.features.columns
        return cut_chunk(self.geometry, columns, start, frames, part.timer.seconds())


def parts_of(latents: int, block: int, columns: int | None, early_first_frame: bool) -> tuple[int, ...]:
    """Latents of a block that are decoded and delivered together.

    That is all of them, but the first alone if it is to come early, unless the audio ends with it.
    """
    early = early_first_frame and block == 0 and latents > 1
    if not early or (columns is not None and columns <= LATENT_FRAME_STRIDE):
        return (latents,)
    return (1, latents - 1)


def cut_chunk(
    geometry: StreamGeometry,
    columns: int | None,
    start: tuple[int, int],
    frames: np.ndarray | Tensor,
    timings: dict[str, float],
) -> FrameChunk:
    """Frames as a chunk: the portrait's are cut off the first block, and what lies past the audio off the last.

    `start` is the block and the latent in it that the frames begin with; `columns` are those of the audio, if known.
    """
    block, latent = start
    first = block * geometry.columns_per_block + latent * LATENT_FRAME_STRIDE
    head = PORTRAIT_FRAMES if first == 0 else 0
    tail = len(frames) if columns is None else max(head + 1, min(len(frames), columns - first))
    return FrameChunk(frames[head:tail], block, first + head, timings)
