"""One process of a pipeline: it loads its stage, connects to its neighbours, and works until the front ends it."""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ...config import StreamGeometry
from ...errors import LiveAvatarError
from ...runtime.timing import DeviceClock
from ..device import local_name, resolve_device
from .link import Door, Link, LinkClosed
from .neighbours import Neighbours, Places
from .outlet import Outlet
from .records import Record
from .setup import Stages, WorkerSetup, load_stages
from .shared_frames import SharedFrames
from .stage_loop import IDLE, STOP, Activity, Arrival, StageLoop
from .trace import NoTrace, Trace, Tracer

BEAT_SECONDS = 0.5
"""Between two signs of life."""
LOST_FRONT = 1
"""Exit status of a worker whose front has gone without a word."""


def host_name() -> str:
    """What tells machines apart, also where they have the same name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text(encoding='ascii').strip() if boot.exists() else ''}".strip()


class Worker:
    """Serves a front as one rank of its plan.

    Args:
        front: the connection to it.
        rank: which one.
        key: that the ranks know.
        host: an address of this machine that the others reach.
        leave: ends the process at once; called when the front has gone.
    """

    def __init__(self, front: Link, rank: int, key: bytes, host: str, leave: Callable[[int], None] = os._exit) -> None:
        self._front, self._rank, self._key, self._host, self._leave = front, rank, key, host, leave
        self._phase = Activity("starting", -1, -1, time.monotonic())
        self._loop: StageLoop | None = None
        self._trace: Trace = NoTrace()
        self._clock_offset = 0.0
        self._ending, self._drain = threading.Event(), threading.Event()

    def drain(self) -> None:
        """Ask the front to finish what is under way; may be called by a signal handler."""
        self._drain.set()

    def serve(self) -> None:
        """Work; returns when the front has ended the pipeline.

        What goes wrong is told to the front, which then ends all workers.
        """
        threading.Thread(target=self._beat, name="liveavatar-beat", daemon=True).start()
        try:
            self._front.send(
                Record("hello", {"rank": self._rank, "pid": os.getpid(), "host": host_name(), "time": time.time()})
            )
            setup = WorkerSetup.decode(self._expect("setup").fields)
            torch.set_num_threads(setup.threads)
            device = resolve_device((local_name(setup.rank.device),))
            self._front.send(Record("agreed"))
            self._clock_offset = self._expect("load")["clock_offset"]
            self._enter("loading")
            stages = load_stages(setup, device, self._progress)
            self._enter("connecting")
            door = Door(self._key, self._host)
            self._front.send(Record("loaded", {"address": list(door.address)}))
            join = self._expect("join")
            neighbours = Neighbours(Places.decode(join), door, self._key, self._host, device)
            self._work(stages, neighbours, device, traced=join["trace"])
        except LinkClosed:
            self._leave(LOST_FRONT)
        except Exception as error:
            self._fail(error)
        finally:
            self._ending.set()

    def _work(self, stages: Stages, neighbours: Neighbours, device: torch.device, *, traced: bool) -> None:
        if traced:
            self._trace = Tracer(self._rank, clock=self._now)
        clock = DeviceClock(device, self._now)
        outlet = Outlet(self._front, neighbours.upstream, neighbours.downstream, clock, self._trace)

        def warmed(geometry: StreamGeometry, record: Record) -> None:
            outlet.senders = neighbours.make_buffers(geometry, torch.float32)
            frames = record.fields.get("frames")
            outlet.frames = None if frames is None else SharedFrames(Path(frames[0]), *frames[1:])

        if stages.denoising is not None:
            stages.denoising.group = neighbours.group
        leader, mates = neighbours.leader, neighbours.mates
        works = stages.model, stages.denoising, stages.decoding
        self._loop = loop = StageLoop(*works, outlet, device, mates, leader is not None, self._say, warmed)
        self._start("front", lambda: self._read_front(loop))
        upstream = neighbours.upstream
        if upstream is not None:
            self._start("upstream", lambda: neighbours.read_upstream(upstream, loop))
        if leader is not None:
            self._start("leader", lambda: neighbours.read_leader(leader, loop))
        for way, link in enumerate(neighbours.downstream):
            self._start("credits", partial(neighbours.read_credits, link, outlet, way))
        leaving = self._start("outlet", outlet.run)
        self._front.send(Record("ready"))
        with torch.inference_mode():
            loop.run()
        self._ending.set()
        outlet.close()
        leaving.join()
        self._front.send(Record("ended", {"spans": [span.encode() for span in self._trace.drain()]}))
        neighbours.close()

    def _start(self, name: str, task: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._guarded, args=(task,), name=f"liveavatar-{name}", daemon=True)
        thread.start()
        return thread

    def _guarded(self, task: Callable[[], None]) -> None:
        """A thread's task; what ends it before the pipeline does is told to the front."""
        try:
            task()
        except Exception as error:
            if not self._ending.is_set():
                self._tell_failure(error, lost_peer=True)

    def _read_front(self, loop: StageLoop) -> None:
        while True:
            try:
                record = self._front.receive()
            except LinkClosed:
                if not self._ending.is_set():
                    self._leave(LOST_FRONT)
                return
            if record.kind == "spans":
                self._front.send(Record("spans", {"spans": [span.encode() for span in self._trace.drain()]}))
            else:
                loop.inbox.put(Arrival(STOP if record.kind == STOP.kind else record))

    def _expect(self, kind: str) -> Record:
        """The front's next record, which is of this kind unless the front has given up."""
        record = self._front.receive()
        if record.kind != kind:
            raise LinkClosed
        return record

    def _enter(self, phase: str) -> None:
        self._phase = Activity(phase, -1, -1, time.monotonic())

    def _progress(self, done: int, total: int) -> None:
        self._front.send(Record("progress", {"done": done, "total": total}))

    def _now(self) -> float:
        """Seconds on the front's clock."""
        return time.time() + self._clock_offset

    def _beat(self) -> None:
        """Signs of life, with what is being done."""
        drained = False
        try:
            while not self._ending.wait(BEAT_SECONDS):
                self._say()
                if self._drain.is_set() and not drained:
                    self._front.send(Record("drain"))
                    drained = True
        except LinkClosed:
            if not self._ending.is_set():
                self._leave(LOST_FRONT)

    def _say(self) -> None:
        """Tell the front what is being done."""
        doing = self._phase if self._loop is None else self._loop.activity
        fields = {"doing": doing.kind, "session": doing.session, "block": doing.block}
        self._front.send(Record("beat", {**fields, "seconds": time.monotonic() - doing.since}))

    def _fail(self, error: Exception) -> None:
        """Tell the front what has gone wrong, and wait for it to end everything."""
        try:
            self._tell_failure(error, lost_peer=False)
            if self._loop is not None:
                threading.Event().wait()
            while True:
                self._front.receive()
        except LinkClosed:
            self._leave(LOST_FRONT)

    def _tell_failure(self, error: Exception, *, lost_peer: bool) -> None:
        doing = self._phase if self._loop is None else self._loop.activity
        known = isinstance(error, LiveAvatarError)
        fields = {
            "error": type(error).__name__,
            "message": str(error) if known else "".join(traceback.format_exception(error)),
            "memory": isinstance(error, torch.cuda.OutOfMemoryError | MemoryError),
            "lost_peer": lost_peer,
            "block": doing.block,
            "doing": doing.kind if doing.kind != IDLE else "",
        }
        try:
            self._front.send(Record("failed", fields))
        except LinkClosed:
            self._leave(LOST_FRONT)
