"""What leaves a stage: on to the next one, or as frames to the front, in order, when the device has made it."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...runtime.timing import DeviceClock, StageTimer
from ...vae.delivery import Pending
from .activity import BLOCK, Activity
from .channel import Credits, LatentSender, Shipment
from .link import Link
from .records import Record
from .shared_frames import SharedFrames
from .trace import COMPUTE, DECODE, DELIVER, SEND, WAIT, Trace

CREDIT = Record("credit")
_TRACED = {"denoise": COMPUTE, "decode": DECODE, "prefill": COMPUTE}


@dataclass(frozen=True)
class Piece:
    """Frames of a block that are delivered together, and the latents that they come from."""

    first_latent: int
    latents: Tensor
    pending: Pending
    timer: StageTimer


class Outlet:
    """Hands on what a stage makes, on a thread of its own: the stage itself never waits for its device.

    Args:
        front: takes chunks and news.
        upstream: is told when there is room for another block; None: blocks come from the front, which is told.
        downstream: the stages after this one, each with records of some sessions; none behind the last.
        clock: of the device, for traces.
        trace: takes spans.

    Attributes:
        senders: carry latents to the stages after this one; set when it is known how large they are.
        credits: for transfers to them.
        frames: where chunks are put for a front on the same machine.
        activity: the block that the device is waited for with, if it is.
    """

    def __init__(
        self, front: Link, upstream: Link | None, downstream: list[Link], clock: DeviceClock, trace: Trace
    ) -> None:
        self.senders: list[LatentSender] = []
        self.credits = [Credits() for _ in downstream]
        self.frames: SharedFrames | None = None
        self.activity = Activity()
        self.trace = trace
        self._front, self._upstream, self._downstream, self._clock = front, upstream, downstream, clock
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Do what is asked for, until `close`.

        Raises:
            LinkClosed, RuntimeError: another process has gone.
        """
        while (task := self._tasks.get()) is not None:
            task()

    def close(self) -> None:
        """Let `run` return after what has been asked for."""
        self._tasks.put(None)

    def tell(self, record: Record) -> None:
        """Tell the front something; tensors are those that the current stream makes."""
        made = [Shipment(tensor) for tensor in record.tensors.values()]
        for tensor in made:
            tensor.mark()
        self._tasks.put(lambda: self._tell(record, made))

    def forward(self, record: Record) -> None:
        """Hand on a record of a session, behind its blocks so far."""
        link = self._downstream[self._way(record)]
        self._tasks.put(lambda: link.send(record))

    def discard(self) -> None:
        """Nothing comes of a block that has been taken in."""
        self._tasks.put(self._give_credit)

    def ship(self, record: Record, latents: Tensor, timer: StageTimer) -> None:
        """Hand on a block's latents; waits until there is a free buffer for them."""
        with self.trace.span(WAIT, record["session"], record["block"], "a free buffer"):
            shipment = self.senders[self._way(record)].load(latents)
        self._tasks.put(lambda: self._ship(record, shipment, timer))

    def deliver(self, record: Record, pieces: list[Piece], timer: StageTimer) -> None:
        """Bring a block's frames, and the latents that they come from, to the front."""
        self._tasks.put(lambda: self._deliver(record, pieces, timer))

    def measure(self, session: int, block: int, timer: StageTimer) -> None:
        """Trace what a timer has measured of work of which nothing leaves."""
        self._tasks.put(lambda: self._add_spans(session, block, timer))

    def _way(self, record: Record) -> int:
        """Which of the stages after this one a session's records go to."""
        return int(record["session"]) % len(self._downstream)

    def _tell(self, record: Record, made: list[Shipment]) -> None:
        for tensor in made:
            tensor.synchronize()
        self._front.send(record)

    def _ship(self, record: Record, shipment: Shipment, timer: StageTimer) -> None:
        session, block, way = record["session"], record["block"], self._way(record)
        self.activity = Activity(BLOCK, session, block)
        shipment.synchronize()
        self.activity = Activity()
        self._give_credit()
        timings = self._measured(record, timer, dict(record.fields.get("timings", {})))
        with self.trace.span(WAIT, session, block, "a free buffer of the next stage"):
            self.credits[way].take()
        with self.trace.span(SEND, session, block):
            self._downstream[way].send(dataclasses.replace(record, fields={**record.fields, "timings": timings}))
            self.senders[way].send(shipment)

    def _deliver(self, record: Record, pieces: list[Piece], timer: StageTimer) -> None:
        session, block = record["session"], record["block"]
        timings = self._measured(record, timer, dict(record.fields.get("timings", {})))
        for index, piece in enumerate(pieces):
            self.activity = Activity(BLOCK, session, block)
            frames = piece.pending.wait()
            self.activity = Activity()
            assert isinstance(frames, np.ndarray)
            timings = self._measured(record, piece.timer, timings)
            with self.trace.span(DELIVER, session, block):
                self._bring(record, index, piece, frames, timings)
            timings = {}
        self._give_credit()

    def _bring(self, record: Record, index: int, piece: Piece, frames: np.ndarray, timings: dict[str, float]) -> None:
        fields = {name: record[name] for name in ("session", "stream", "block")}
        fields |= {"first_latent": piece.first_latent, "timings": timings, "slot": record["slots"][index]}
        tensors = {"latents": piece.latents}
        if self.frames is not None:
            self.frames.write(record["slots"][index], frames)
            fields["shape"] = list(frames.shape)
        else:
            tensors["frames"] = torch.from_numpy(frames)
        self._front.send(Record("chunk", fields, tensors))

    def _measured(self, record: Record, timer: StageTimer, timings: dict[str, float]) -> dict[str, float]:
        """Seconds by stage, with those of a timer, whose spans are traced."""
        for name, seconds in timer.seconds().items():
            timings[name] = timings.get(name, 0.0) + seconds
        self._add_spans(record["session"], record["block"], timer)
        return timings

    def _add_spans(self, session: int, block: int, timer: StageTimer) -> None:
        for name, start, end in timer.spans():
            self.trace.add(_TRACED[name], self._clock.at(start), self._clock.at(end), session, block, name)

    def _give_credit(self) -> None:
        (self._upstream or self._front).send(CREDIT)
