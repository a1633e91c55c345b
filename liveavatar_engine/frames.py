"""What a stream delivers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config.geometry import FRAMES_PER_SECOND


@dataclass(frozen=True)
class FrameChunk:
    """The video frames of one block, or of a part of the first one.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB; a tensor on the engine's device with `EngineConfig.frames` "device".
        index: of the block in its stream.
        start_column: audio column (1/25 s) that drives the first frame; frame j is driven by start_column + j. The
            first block of a stream starts at column 3: its first three frames belong to the portrait.
        timings: seconds spent per stage: "audio", "denoise", "decode".
    """

    frames: Any
    index: int
    start_column: int
    timings: dict[str, float]

    @property
    def start_time(self) -> float:
        """Seconds from the start of the audio at which the first frame belongs."""
        return self.start_column / FRAMES_PER_SECOND

    @property
    def end_time(self) -> float:
        """Seconds from the start of the audio at which the last frame's display ends."""
        return (self.start_column + len(self.frames)) / FRAMES_PER_SECOND
