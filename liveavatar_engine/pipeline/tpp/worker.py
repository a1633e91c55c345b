"""One process of a pipeline: it loads its stage, connects to its neighbours, and works until the front ends it."""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch

from ...config import StreamGeometry
from ...errors import LiveAvatarError
from ...runtime.timing import DeviceClock
from ..device import local_name, resolve_device
from .activity import Activity
from .link import Door, Link, LinkClosed
from .neighbours import Neighbours, Places
from .outlet import Outlet
from .records import Record
from .setup import Stages, WorkerSetup, load_stages
from .shared_frames import SharedFrames
from .stage_loop import STOP, Arrival, StageLoop
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
        self._phase = Activity("starting")
        self._parent = os.getppid()
        self._device = torch.device("cpu")
        self._loop: StageLoop | None = None
        self._trace: Trace = NoTrace()
        self._clock_offset = 0.0
        self._ending, self._drain, self._front_gone = threading.Event(), threading.Event(), threading.Event()
        self._news = threading.Event()

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
            self._device = device = resolve_device((local_name(setup.rank.device),))
            if device.type == "cuda":
                torch.cuda.set_device(device)
            self._front.send(Record("agreed"))
            self._clock_offset = self._expect("load")["clock_offset"]
            self._enter("loading")
            stages = load_stages(setup, device, self._progress)
            self._enter("connecting")
            door = Door(self._key, self._host)
            self._front.send(Record("loaded", {"address": list(door.address)}))
            join = self._expect("join")
            neighbours = Neighbours(Places.decode(join), door, self._key, self._host, device)
            self._work(stages, neighbours, traced=join["trace"])
        except LinkClosed:
            self._leave(LOST_FRONT)
        except Exception as error:
            self._fail(error)
        finally:
            self._end()

    def _work(self, stages: Stages, neighbours: Neighbours, *, traced: bool) -> None:
        if traced:
            self._trace = Tracer(self._rank, clock=self._now)
        clock = DeviceClock(self._device, self._now)
        outlet = Outlet(self._front, neighbours.upstream, neighbours.downstream, clock, self._trace)

        def warmed(geometry: StreamGeometry, record: Record) -> None:
            outlet.senders = neighbours.make_buffers(geometry, torch.float32)
            frames = record.fields.get("frames")
            outlet.frames = None if frames is None else SharedFrames(Path(frames[0]), *frames[1:])

        if stages.denoising is not None:
            stages.denoising.group = neighbours.group
        leader, mates = neighbours.leader, neighbours.mates
        works = stages.model, stages.denoising, stages.decoding
        begun = self._news.set
        self._loop = loop = StageLoop(*works, outlet, self._device, mates, leader is not None, begun, warmed)
        self._start("front", lambda: self._read_front(loop))
        upstream = neighbours.upstream
        if upstream is not None:
            self._start("upstream", lambda: neighbours.read_upstream(upstream, loop))
        if leader is not None:
            self._start("leader", lambda: neighbours.read_leader(leader, loop))
        for link, credits in zip(neighbours.downstream, outlet.credits, strict=True):
            self._start("credits", partial(neighbours.read_credits, link, credits))
        leaving = self._start("outlet", outlet.run)
        self._front.send(Record("ready"))
        try:
            with torch.inference_mode():
                loop.run()
        except LinkClosed as error:
            self._fail(error, lost_peer=True)
            return
        self._end()
        outlet.close()
        leaving.join()
        self._front.send(Record("ended"))
        neighbours.close()

    def _start(self, name: str, task: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._guarded, args=(task,), name=f"liveavatar-{name}", daemon=True)
        thread.start()
        return thread

    def _guarded(self, task: Callable[[], None]) -> None:
        """A thread's task; what ends it before the pipeline does is told to the front."""
        try:
            with self._beside_the_stage():
                task()
        except Exception as error:
            if not self._ending.is_set():
                self._tell_failure(error, lost_peer=True)

    def _beside_the_stage(self) -> AbstractContextManager[object]:
        """What a thread copies from or to the device does not queue up behind what the stage has given it."""
        if self._device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self._device))

    def _read_front(self, loop: StageLoop) -> None:
        while True:
            try:
                record = self._front.receive()
            except LinkClosed:
                self._front_gone.set()
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
        self._phase = Activity(phase)

    def _progress(self, done: int, total: int) -> None:
        self._front.send(Record("progress", {"done": done, "total": total}))

    def _now(self) -> float:
        """Seconds on the front's clock."""
        return time.time() + self._clock_offset

    def _beat(self) -> None:
        """Signs of life, with what is being done: now and then, and at once when there is news."""
        drained = False
        try:
            while not self._ending.is_set():
                self._news.wait(BEAT_SECONDS)
                self._news.clear()
                if os.getppid() != self._parent:  # a link may stay open in a process that the parent has forked
                    self._leave(LOST_FRONT)
                self._say()
                if self._drain.is_set() and not drained:
                    self._front.send(Record("drain"))
                    drained = True
        except LinkClosed:
            if not self._ending.is_set():
                self._leave(LOST_FRONT)

    def _end(self) -> None:
        """From now on it is no failure that others hang up."""
        self._ending.set()
        self._news.set()

    def _doing(self) -> Activity:
        return self._phase if self._loop is None else self._loop.activity

    def _say(self) -> None:
        """Tell the front what is being done."""
        doing = self._doing()
        seconds = time.monotonic() - doing.since
        self._front.send(Record("beat", {"doing": doing.kind, "block": doing.block, "seconds": seconds}))

    def _fail(self, error: Exception, *, lost_peer: bool = False) -> None:
        """Tell the front what has gone wrong, and wait for it to end everything."""
        self._tell_failure(error, lost_peer=lost_peer)
        if self._loop is None:
            with suppress(LinkClosed):
                while True:
                    self._front.receive()
        else:
            self._front_gone.wait()
        self._leave(LOST_FRONT)

    def _tell_failure(self, error: Exception, *, lost_peer: bool) -> None:
        fields = {
            "error": type(error).__name__,
            "message": _told(error),
            "memory": isinstance(error, torch.cuda.OutOfMemoryError | MemoryError),
            "lost_peer": lost_peer,
            "block": self._doing().block,
        }
        try:
            self._front.send(Record("failed", fields))
        except LinkClosed:
            self._leave(LOST_FRONT)


def _told(error: Exception) -> str:
    """What is said of an error: all that is known, unless it speaks for itself."""
    if isinstance(error, LinkClosed):
        return "another rank has hung up"
    return str(error) if isinstance(error, LiveAvatarError) else "".join(traceback.format_exception(error))
