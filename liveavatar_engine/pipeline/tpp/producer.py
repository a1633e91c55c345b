"""A stream whose blocks are made by workers: what its session's thread sees of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import LiveAvatarError
from ...frames import FrameChunk
from ...runtime.timing import StageTimer
from ..production import cut_chunk, parts_of
from ..runner import StreamOrder
from .channel import BUFFERS
from .records import Record

_POLL_SECONDS = 0.05
"""After which a waiting session looks whether it has been closed."""

ReadFrames = Callable[[int, tuple[int, ...]], np.ndarray]
"""Copies the frames in a slot, of some shape."""


@dataclass(frozen=True)
class Berth:
    """A stream's place in a pipeline.

    Attributes:
        session: its number in its lane.
        stream: a number that no other stream of the engine has.
        slots: for frames that have been made, or are being made, and not been taken yet.
        gate: of the lane's first stage, which lets streams in by turns.
        send: hands a record to the lane's first stage, in order.
        read: takes frames out of a slot, where they are not in the record.
    """

    session: int
    stream: int
    slots: range
    gate: Gate
    send: Callable[[Record], None]
    read: ReadFrames

    def record(self, kind: str, tensors: dict[str, Tensor] | None = None, **fields: object) -> Record:
        """A record of this stream."""
        return Record(kind, {"session": self.session, "stream": self.stream, **fields}, tensors or {})


class Gate:
    """Lets blocks into a lane, as many as its first stage has buffers for, in the order in which they were brought.

    So streams that all have blocks to bring take turns, and none has to wait for more than one block of each other.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._free = BUFFERS
        self._waiting: deque[object] = deque()

    def enter(self, over: Callable[[], bool]) -> bool:
        """Wait for a turn; False when it is `over` before it comes."""
        me = object()
        with self._changed:
            self._waiting.append(me)
            try:
                while not (self._free and self._waiting[0] is me):
                    if over():
                        return False
                    self._changed.wait(_POLL_SECONDS)
                self._free -= 1
                return True
            finally:
                self._waiting.remove(me)
                self._changed.notify_all()

    def leave(self) -> None:
        """The first stage has done with a block."""
        with self._changed:
            self._free += 1
            self._changed.notify_all()


class PipelineProducer:
    """Feeds a stream's blocks to the first stage on a thread of its own, and takes their frames from the last.

    A block is fed when its audio is there and slots are free for its frames. So no more blocks are under way, or wait
    to be taken, than there are slots, and nobody in the pipeline ever waits for who reads the frames.

    Args:
        order: what is streamed.
        berth: where.
        early_first_frame: whether the first latent's frames come on their own.
        ended: when it is set, no further block is fed.
        device: that audio states are made on.
    """

    def __init__(
        self, order: StreamOrder, berth: Berth, early_first_frame: bool, ended: threading.Event, device: torch.device
    ) -> None:
        self.geometry, self.features, self.max_blocks = order.geometry, order.features, order.max_blocks
        self._order, self._berth, self._early = order, berth, early_first_frame
        self._ended, self._device = ended, device
        self._changed = threading.Condition()
        self._free = deque(berth.slots)
        self._arrived: deque[Record] = deque()
        self._first_latent = self._closed = self._fed = False
        self._asked = self._taken = 0
        self._sending = threading.RLock()
        self._left = False
        self._error: LiveAvatarError | None = None
        self._thread = threading.Thread(target=self._feed, name="liveavatar-feed", daemon=True)

    def start(self) -> None:
        """Open the stream in the pipeline, and begin to feed it."""
        conditions, policy = self._order.conditions, self._order.policy
        named = {
            "context": conditions.context,
            "reference": conditions.reference,
            "motion": conditions.motion,
            "actor_mask": conditions.actor_mask,
            "priming": self._order.priming,
        }
        tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
        fields = {"distance": policy.distance, "update_after": policy.update_after, "seed": policy.seed}
        self._berth.send(self._berth.record("open", tensors, **fields))
        self._thread.start()

    def next(self, closed: Callable[[], bool]) -> tuple[FrameChunk, Tensor] | None:
        """The next chunk and its latents, on the CPU; None behind the last one, or once `closed`.

        Raises:
            WorkerError: a worker has failed.
            ModelError: the model has.
        """
        with self._changed:
            while not self._arrived:
                if self._error is not None:
                    raise self._error
                if closed() or (self._fed and self._taken == self._asked):
                    return None
                self._changed.wait(_POLL_SECONDS)
            record = self._arrived.popleft()
        slot = record["slot"]
        frames = record.tensors.get("frames")
        pixels = self._berth.read(slot, tuple(record["shape"])) if frames is None else frames.numpy()
        with self._changed:
            self._taken += 1
            self._free.append(slot)
            self._changed.notify_all()
        start = record["block"], record["first_latent"]
        chunk = cut_chunk(self.geometry, self.features.columns, start, pixels, dict(record["timings"]))
        return chunk, record.tensors["latents"]

    def change_prompt(self, context: Tensor) -> None:
        self._berth.send(self._berth.record("prompt", {"context": context}))

    def close(self) -> None:
        """End the stream behind the blocks that are under way; its slot is free when the last stage says so.

        Nothing is sent here, by whoever lets go of a session, but on the feeding thread.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def leaving(self) -> bool:
        """Whether its slot will be free without anybody's doing."""
        return self._closed or self._error is not None

    # --- what the pipeline says

    def take(self, chunk: Record) -> None:
        """Frames have come."""
        with self._changed:
            self._arrived.append(chunk)
            self._changed.notify_all()

    def take_first_latent(self) -> None:
        """The first generated latent is on its way to all stages."""
        with self._changed:
            self._first_latent = True
            self._changed.notify_all()

    def fail(self, error: LiveAvatarError) -> None:
        """Nothing more will come; the stream leaves the pipeline, even while it waits for audio."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        self._leave()

    # --- feeding

    def _feed(self) -> None:
        index = 0
        try:
            while self._feed_block(index):
                index += 1
            with self._changed:
                self._fed = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._error is not None)
        except LiveAvatarError as error:
            self.fail(error)
        except Exception as error:
            failure = LiveAvatarError(f"block {index}: {error}")
            failure.__cause__ = error
            self.fail(failure)
        self._leave()

    def _leave(self) -> None:
        """Tell all stages that no more comes, behind what they have been sent."""
        with self._sending:
            if self._left:
                return
            self._left = True
            with suppress(LiveAvatarError):  # a pipeline that has failed needs no telling
                self._berth.send(self._berth.record("close"))

    def _feed_block(self, index: int) -> bool:
        """Feed a block; False when there is none."""
        order, timer = self._order, StageTimer(self._device)
        if index == order.max_blocks or not self._wait_for_room(index):
            return False
        with timer.stage("audio"):
            states = order.features.block(index)
        if states is None or self._over():
            return False
        pose = None if order.pose is None else order.pose.block(index)
        parts = parts_of(order.geometry.frames_per_block, index, order.features.columns, self._early)
        slots = self._take_slots(parts)
        if slots is None:
            return False
        if not self._berth.gate.enter(self._over):
            return False
        tensors = {"states": states} if pose is None else {"states": states, "pose": pose}
        fields = {"block": index, "parts": list(parts), "slots": slots, "timings": timer.seconds()}
        with self._sending:
            if self._left:
                return False
            with self._changed:
                self._asked += len(parts)
            self._berth.send(self._berth.record("block", tensors, **fields))
        return True

    def _over(self) -> bool:
        return self._closed or self._ended.is_set() or self._error is not None

    def _wait_for_room(self, index: int) -> bool:
        """Wait until a block may enter the pipeline; False when none may any more."""
        update_after = self._order.policy.update_after

        def may_enter() -> bool:
            seen = update_after is None or index < update_after or self._first_latent
            return self._over() or (seen and bool(self._free))

        with self._changed:
            while not self._changed.wait_for(may_enter, _POLL_SECONDS):
                pass
            return not self._over()

    def _take_slots(self, parts: Sequence[int]) -> list[int] | None:
        """A slot for each part, as soon as there are enough; None when the stream is over."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._over() or len(self._free) >= len(parts), _POLL_SECONDS):
                pass
            if self._over():
                return None
            return [self._free.popleft() for _ in parts]
