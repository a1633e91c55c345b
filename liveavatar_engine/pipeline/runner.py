"""What an engine needs from the devices that make its blocks: one of them, or a pipeline over several."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..conditions.audio_features import Features
from ..conditions.pose import PoseStream
from ..config import ModelConfig, StreamGeometry
from ..denoise.stream import Conditions, SinkPolicy
from ..errors import LiveAvatarError, SessionError
from ..frames import FrameChunk


@dataclass(frozen=True)
class StreamOrder:
    """A stream that is asked for.

    Attributes:
        geometry: of its blocks.
        conditions: what it shows.
        policy: of the sink; its seed is also that of the noise.
        priming: latents that run through the decoder before the stream's own.
        features: audio states, block by block.
        pose: of a pose video, or None.
        max_blocks: after which it ends, or None.
    """

    geometry: StreamGeometry
    conditions: Conditions
    policy: SinkPolicy
    priming: Tensor
    features: Features
    pose: PoseStream | None = None
    max_blocks: int | None = None


@dataclass(frozen=True)
class WorkerInfo:
    """A process that works for an engine.

    Attributes:
        rank: its number in the plan.
        pid: its process, on `host`.
        stage: what it does, such as "step 2" or "decode".
        device: that it does it on.
    """

    rank: int
    pid: int
    host: str
    stage: str
    device: str


class Ending:
    """How an engine's streams are to end.

    Attributes:
        draining: no further block is begun; streams end with those that are under way.
        closed: nothing more is made, and who waits for it is told so.
    """

    def __init__(self) -> None:
        self.draining = threading.Event()
        self.closed = threading.Event()

    def close(self) -> None:
        self.draining.set()
        self.closed.set()

    def check(self) -> None:
        """Raise a SessionError once the engine is closed."""
        if self.closed.is_set():
            raise SessionError("the engine is closed")


class Producer(Protocol):
    """Makes the chunks of one stream, in order."""

    geometry: StreamGeometry
    features: Features
    max_blocks: int | None

    def next(self, closed: Callable[[], bool]) -> tuple[FrameChunk, Tensor] | None:
        """The next chunk and its latents; None behind the last one, or when nothing has been begun once `closed`."""
        ...

    def change_prompt(self, context: Tensor) -> None:
        """Let another prompt, [tokens, text_dim], count from one of the next blocks on."""
        ...

    def close(self) -> None:
        """Let go of what the stream needed; called once, when no chunk is being made."""
        ...


class Runner(Protocol):
    """Makes blocks of the sessions of an engine."""

    model: ModelConfig

    def warm_up(self, geometry: StreamGeometry, actors: int, masked: bool) -> None:
        """Allocate and record all that streams of this geometry need.

        Raises:
            SessionError: sessions of another size are open, or all slots are taken.
        """
        ...

    def open(self, order: StreamOrder) -> Producer:
        """Take a slot and begin a stream.

        Raises:
            SessionError: all slots are taken, or sessions of another size are open.
        """
        ...

    @property
    def free_slots(self) -> int:
        """Sessions that can still be opened."""
        ...

    @property
    def failure(self) -> LiveAvatarError | None:
        """Why no session can be made any more, if something has broken."""
        ...

    def workers(self) -> list[WorkerInfo]:
        """The processes that work for the engine, by rank; none where the engine's own does everything."""
        ...

    def drain(self) -> None:
        """Begin no further block: streams end with those that are under way."""
        ...

    def close(self) -> None:
        """End all streams and let go of everything; a second call does nothing."""
        ...
