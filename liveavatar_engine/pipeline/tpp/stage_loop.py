"""A worker's stage at work: records of sessions come in order, and what they ask for leaves in the same order."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import ModelConfig, StreamGeometry
from ...errors import LiveAvatarError
from ...runtime.group import Group
from ...runtime.timing import StageTimer
from .activity import BLOCK, FULL, IDLE, Activity
from .channel import Shipment
from .link import Link
from .outlet import Outlet, Piece
from .records import Record
from .stages import Decoding, Denoising, pieces
from .trace import WAIT, Trace

STOP = Record("stop")


@dataclass(frozen=True)
class Arrival:
    """A record, and the latents that came with it."""

    record: Record
    latents: Shipment | None = None


class StageLoop:
    """Takes records from `inbox` and does what they say, on the calling thread.

    Args:
        model: sizes of the network.
        denoising: the stage's steps, if any.
        decoding: the decoder, if it is one.
        outlet: takes what leaves.
        device: that the stage works on.
        mates: links to the ranks that share the steps and do what this one does.
        led: whether this is one of them.
        begun: called when a block is begun.
        warmed: called with a geometry that streams will have, and the record, when the stage is ready for it.
    """

    def __init__(
        self,
        model: ModelConfig,
        denoising: Denoising | None,
        decoding: Decoding | None,
        outlet: Outlet,
        device: torch.device,
        mates: Sequence[Link],
        led: bool,
        begun: Callable[[], None],
        warmed: Callable[[StreamGeometry, Record], None],
    ) -> None:
        self.inbox: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._activity = Activity()
        self._model, self._denoising, self._decoding = model, denoising, decoding
        self._outlet, self._device, self._warmed = outlet, device, warmed
        self._mates, self._led, self._begun = mates, led, begun
        self._geometry: StreamGeometry | None = None
        self._streams: dict[int, int] = {}
        self._failed: set[int] = set()
        self._handlers: dict[str, Callable[[Arrival], None]] = {
            "warm_up": self._warm_up,
            "open": self._open,
            "block": self._block,
            "prompt": self._prompt,
            "first_latent": self._first_latent,
            "prepare": self._prepare,
            "close": self._close,
        }

    @property
    def trace(self) -> Trace:
        return self._outlet.trace

    @property
    def activity(self) -> Activity:
        """What holds this stage up: what it does, or a block before that which its device has not done with."""
        own, behind = self._activity, self._outlet.activity
        older = behind.kind == BLOCK and (own.kind != BLOCK or behind.since < own.since)
        return behind if older else own

    def run(self) -> None:
        """Work until STOP comes.

        Raises:
            Exception: whatever a device or another process does; errors of single sessions are told to the front.
        """
        while (arrival := self._next()).record is not STOP:
            record = arrival.record
            session = record.fields.get("session", -1)
            block = record.fields.get("block", self._activity.block if session >= 0 else -1)
            self._activity = Activity(record.kind, session, block)
            if record.kind == BLOCK:
                self._begun()
            try:
                if self._is_wanted(record):
                    self._do(arrival)
                else:
                    self._drop(arrival)
            except LiveAvatarError as error:
                if session < 0:
                    raise
                self._give_up(arrival, block, error)
            self._activity = Activity(IDLE, session, block)

    def _is_wanted(self, record: Record) -> bool:
        """Whether a record is of no stream, or of one that has neither failed nor been closed.

        A prompt, or the first latent, may have been sent when its stream was just being closed.
        """
        if record.kind == "open" or "stream" not in record.fields:
            return True
        session = record["session"]
        is_open = self._streams.get(session) == record["stream"]
        return is_open and (session not in self._failed or record.kind == "close")

    def _give_up(self, arrival: Arrival, block: int, error: LiveAvatarError) -> None:
        """Tell the front that a session cannot go on; the rank that leads this one, if any, tells it itself."""
        record = arrival.record
        self._failed.add(record["session"])
        if not self._led:
            fields = {"session": record["session"], "stream": record["stream"], "block": block}
            fields |= {"error": type(error).__name__, "message": str(error)}
            self._outlet.tell(Record("session_failed", fields))
        self._drop(arrival)

    def _do(self, arrival: Arrival) -> None:
        """Do what a record says, and let mates do the same."""
        if arrival.record.kind != "warm_up":
            for mate in self._mates:
                mate.send(arrival.record)
        self._handlers[arrival.record.kind](arrival)

    def _next(self) -> Arrival:
        try:
            return self.inbox.get_nowait()
        except queue.Empty:
            with self.trace.span(WAIT, -1, -1, "records"):
                return self.inbox.get()

    def _drop(self, arrival: Arrival) -> None:
        if arrival.record.kind == BLOCK and not self._led:
            self._outlet.discard()

    def _pass_on(self, record: Record) -> None:
        if self._decoding is None and not self._led:
            self._outlet.forward(record)

    def _warm_up(self, arrival: Arrival) -> None:
        record = arrival.record
        sizes = (record[name] for name in ("height", "width", "frames_per_block", "ring_frames", "motion_tokens"))
        self._geometry = geometry = StreamGeometry(self._model, *sizes)
        if self._denoising is not None:
            self._denoising.warm_up(geometry, record["actors"], record["masked"])
        if self._decoding is not None:
            self._decoding.warm_up(geometry)
        self._warmed(geometry, record)
        self._outlet.tell(Record("warmed"))

    def _open(self, arrival: Arrival) -> None:
        record = arrival.record
        self._streams[record["session"]] = record["stream"]
        self._failed.discard(record["session"])
        self._pass_on(record)
        if self._denoising is not None:
            self._denoising.open(record["session"], record)
        if self._decoding is not None:
            self._decoding.open(record["session"], record)

    def _block(self, arrival: Arrival) -> None:
        record, timer = arrival.record, StageTimer(self._device)
        session, latents = record["session"], None
        if arrival.latents is not None:
            latents = arrival.latents.wait()
        if self._denoising is not None and self._denoising.group is not None and not self._denoising.begins:
            latents = self._shared(self._denoising.group, latents)
        if self._denoising is not None:
            with timer.stage("denoise"):
                latents = self._denoising.block(session, record, latents)
            if self._led:
                self._outlet.measure(session, record["block"], timer)
                return
            if self._denoising.ends and record["block"] == 0:
                told = {"session": session, "stream": record["stream"]}
                self._outlet.tell(Record("first_latent", told, {"latent": latents[:, :1].clone()}))
        assert latents is not None
        if self._decoding is None:
            self._activity = Activity(FULL, session, record["block"])
            self._outlet.ship(record, latents, timer)
            return
        made = []
        for start, piece in pieces(latents, record["parts"]):
            own = StageTimer(self._device)
            made.append(Piece(start, piece, self._decoding.start(session, piece, own), own))
        self._outlet.deliver(record, made, timer)

    def _prompt(self, arrival: Arrival) -> None:
        record = arrival.record
        self._pass_on(record)
        if self._denoising is not None:
            self._denoising.change_prompt(record["session"], record.tensors["context"])

    def _first_latent(self, arrival: Arrival) -> None:
        record, denoising = arrival.record, self._denoising
        self._pass_on(record)
        if denoising is None:
            return
        if not denoising.ends:
            denoising.show_first_latent(record["session"], record.tensors["latent"])
        if self.inbox.empty() and not self._led:
            self._do(Arrival(Record("prepare", {"session": record["session"]})))

    def _prepare(self, arrival: Arrival) -> None:
        if self._denoising is None:
            return
        session, timer = arrival.record["session"], StageTimer(self._device)
        with timer.stage("prefill"):
            block = self._denoising.prepare(session)
        if block is not None:
            self._outlet.measure(session, block, timer)

    def _shared(self, group: Group, latents: Tensor | None) -> Tensor:
        """The latents that the rank which leads this one, or this one, has been sent."""
        if latents is not None:
            return group.share(latents)
        assert self._geometry is not None
        return group.share(torch.empty(self._geometry.block_shape, device=self._device))

    def _close(self, arrival: Arrival) -> None:
        record = arrival.record
        del self._streams[record["session"]]
        self._failed.discard(record["session"])
        self._pass_on(record)
        if self._denoising is not None:
            self._denoising.close(record["session"])
        if self._decoding is not None:
            self._decoding.close(record["session"])
            self._outlet.tell(Record("closed", {name: record[name] for name in ("session", "stream")}))
