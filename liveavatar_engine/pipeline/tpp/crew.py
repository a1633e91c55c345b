"""The worker processes of a plan, as their front sees them: started, watched, and ended together."""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from ... import errors
from ...errors import LiveAvatarError, WorkerError
from ..runner import WorkerInfo
from .launch import Launcher, Process
from .link import Address, Door, LinkClosed
from .member import DIED, FAILED, LOST_PEER, SILENT, Member, Suspicion
from .plan import Plan
from .records import Record
from .setup import Progress, WorkerSetup
from .stage_loop import STOP
from .trace import Span
from .transport import open_store
from .worker import host_name

_log = logging.getLogger(__name__)
SILENT_SECONDS = 5.0
"""Without a sign of life, after which a worker counts as hanging."""
LOADING_SECONDS = 60.0
"""The same while it starts, loads or warms up, where one call into a library can hold up a whole process."""
_GRACE_SECONDS = 0.4
"""From a first sign that something is wrong until it is clear whose fault it is."""
_PAUSE_SECONDS = 1.0
"""Between two looks of the watch, after which this process itself has been held up, and knows nothing of the others."""
_KILL_SECONDS = 3.0
"""For killed processes to be gone; one whose device's driver hangs may never be."""
_END_SECONDS = 10.0
"""For workers to end what they have begun, when the engine is closed."""
_LOADING = ("starting", "loading", "connecting", "warm_up")
_SETUP = ("hello", "agreed", "loaded", "ready", "warmed", "ended")

OnRecord = Callable[[int, Record], None]


class Crew:
    """Starts the workers of a plan and connects them.

    Args:
        plan: who does what.
        launcher: how processes come to be.
        on_record: called with rank and record, on a thread per worker, for what belongs to sessions.
        on_failure: called once, when a worker has failed and all have been ended.
        on_drain: called when a worker has been asked to end (SIGTERM).
        trace: whether workers collect spans.

    Attributes:
        failure: why no worker is left, once one has failed.
    """

    def __init__(
        self,
        plan: Plan,
        launcher: Launcher,
        on_record: OnRecord,
        on_failure: Callable[[WorkerError], None],
        on_drain: Callable[[], None],
        *,
        trace: bool = False,
    ) -> None:
        self.plan, self.traced = plan, trace
        self.failure: WorkerError | None = None
        self._launcher, self._on_record, self._on_failure, self._on_drain = launcher, on_record, on_failure, on_drain
        self._members: dict[int, Member] = {}
        self._answers: dict[str, queue.SimpleQueue[tuple[int, Record]]] = {k: queue.SimpleQueue() for k in _SETUP}
        self._spans: queue.SimpleQueue[tuple[int, Record]] = queue.SimpleQueue()
        self._progress: Progress = lambda done, total: None
        self._suspicions: list[Suspicion] = []
        self._suspected = threading.Condition()
        self._started, self._closing = threading.Event(), threading.Event()
        self._looked = time.monotonic()
        self._processes: list[Process] = []
        self._store: dist.TCPStore | None = None

    def start(
        self, setups: Callable[[Mapping[int, WorkerInfo]], Sequence[WorkerSetup]], progress: Progress | None = None
    ) -> None:
        """Start all workers, let them load and connect them; `setups` says what each is told.

        Raises:
            LiveAvatarError: what a worker could not do; all of them have been ended.
        """
        self._progress = progress or self._progress
        key = secrets.token_bytes(32)
        door = Door(key, self._launcher.host)
        try:
            self._processes = self._launcher.start(door.address, key, len(self.plan))
            threading.Thread(target=self._watch, name="liveavatar-watch", daemon=True).start()
            self._meet(door)
            for setup in setups({rank: member.info for rank, member in self._members.items()}):
                self.send(setup.rank.rank, Record("setup", setup.encode()))
            self._all("agreed")
            for member in self._members.values():
                member.link.send(Record("load", {"clock_offset": self._offsets[member.plan.rank]}))
            loaded = self._all("loaded")
            self._join({rank: (record["address"][0], record["address"][1]) for rank, record in loaded.items()})
            self._all("ready")
            self._started.set()
        except LinkClosed:
            self._raise_failure()
        finally:
            door.close()
            if not self._started.is_set() and self.failure is None:
                self._closing.set()
                self._kill()
        _log.info("%d workers are ready: %s", len(self.plan), ", ".join(rank.stage for rank in self.plan.ranks))

    def workers(self) -> list[WorkerInfo]:
        """The workers, by rank."""
        return [self._members[rank].info for rank in sorted(self._members)]

    def is_here(self, rank: int) -> bool:
        """Whether a worker is on this machine."""
        return self._members[rank].info.host == host_name()

    def send(self, rank: int, record: Record) -> None:
        """Send a record to a worker.

        Raises:
            WorkerError: a worker has failed.
        """
        try:
            self._members[rank].link.send(record)
        except LinkClosed:
            self._raise_failure()

    def ask_all(self, records: Mapping[int, Record], answer: str) -> None:
        """Send each worker a record, and wait until all have answered.

        Raises:
            LiveAvatarError: what a worker could not do.
        """
        for rank, record in records.items():
            self.send(rank, record)
        self._all(answer)

    def spans(self) -> list[Span]:
        """What the workers have done since the last call, if they are traced."""
        if not self.traced or self.failure is not None:
            return []
        for rank in self._members:
            self.send(rank, Record("spans"))
        found = [self._answer(self._spans)[1] for _ in self._members]
        return [Span.decode(values) for record in found for values in record["spans"]]

    def close(self) -> None:
        """Let the workers finish what they have been given, and end them; a second call does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self.failure is not None:
            return
        members = self._members.values()
        for member in members:
            with suppress(LinkClosed):
                member.link.send(STOP)
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline and not all(member.ended for member in members):
            time.sleep(0.01)
        self._kill(gently=all(member.ended for member in members))

    # --- starting

    def _meet(self, door: Door) -> None:
        """Take every worker's connection."""
        self._offsets: dict[int, float] = {}
        waiting = threading.Thread(target=self._watch_start, args=(door,), daemon=True)
        waiting.start()
        while len(self._members) < len(self.plan):
            link = door.accept()
            hello = link.receive()
            apart = time.time() - hello["time"]  # with the time that the message took
            self._offsets[hello["rank"]] = 0.0 if hello["host"] == host_name() else apart
            plan = self.plan.ranks[hello["rank"]]
            info = WorkerInfo(plan.rank, hello["pid"], hello["host"], plan.stage, plan.device)
            member = Member(plan, link, info, time.monotonic())
            self._members[plan.rank] = member
            threading.Thread(target=self._read, args=(member,), name="liveavatar-crew", daemon=True).start()

    def _watch_start(self, door: Door) -> None:
        """Give up waiting for workers whose processes have ended."""
        while len(self._members) < len(self.plan) and not self._closing.is_set():
            for process in self._processes:
                if process.rank not in self._members and process.poll() is not None:
                    self._suspect(DIED, process.rank, f"ended with status {process.poll()} before it was ready")
                    door.interrupt()
                    return
            time.sleep(0.1)

    def _join(self, addresses: Mapping[int, Address]) -> None:
        """Tell each worker who its neighbours are."""
        self._store = open_store(self._launcher.host)
        for lane in self.plan.lanes:
            ways = [tuple(rank.rank for rank in stage) for stage in lane.stages]
            decoders = tuple(rank.rank for rank in lane.decoders) if lane.decodes_apart else ()
            for index, mates in enumerate(ways):
                after = ways[index + 1][:1] if index + 1 < len(ways) else decoders
                before = ways[index - 1][0] if index else None
                for rank in mates:
                    leads = rank == mates[0]
                    places = self._places(rank, before if leads else None, after if leads else (), mates, addresses)
                    self.send(rank, places)
            for rank in decoders:
                self.send(rank, self._places(rank, ways[-1][0], (), (), addresses))

    def _places(
        self, rank: int, upstream: int | None, after: Sequence[int], mates: Sequence[int], doors: Mapping[int, Address]
    ) -> Record:
        assert self._store is not None
        shared = list(mates) if len(mates) > 1 else []
        led = shared[1:] if shared[:1] == [rank] else []
        fields: dict[str, Any] = {
            "rank": rank,
            "upstream": upstream,
            "downstream": list(after),
            "addresses": [list(doors[other]) for other in after],
            "mates": shared,
            "mate_addresses": [list(doors[other]) for other in led],
            "store": [[self._launcher.host, self._store.port]],
            "trace": self.traced,
        }
        return Record("join", fields)

    def _all(self, kind: str) -> dict[int, Record]:
        """Every worker's answer of a kind."""
        return dict(self._answer(self._answers[kind]) for _ in range(len(self.plan)))

    def _answer(self, answers: queue.SimpleQueue[tuple[int, Record]]) -> tuple[int, Record]:
        while True:
            try:
                return answers.get(timeout=0.1)
            except queue.Empty:
                if self.failure is not None or self._closing.is_set():
                    self._raise_failure()

    # --- watching

    def _read(self, member: Member) -> None:
        rank = member.plan.rank
        try:
            while True:
                record = member.link.receive()
                member.last_beat = time.monotonic()
                if record.kind in self._answers:
                    member.ended = record.kind == "ended"
                    self._answers[record.kind].put((rank, record))
                elif record.kind == "beat":
                    member.hear(record)
                elif record.kind == "failed":
                    self._accuse(rank, record)
                elif record.kind == "spans":
                    self._spans.put((rank, record))
                elif record.kind == "progress":
                    self._progress(record["done"], record["total"])
                elif record.kind == "drain":
                    self._on_drain()
                else:
                    self._on_record(rank, record)
        except LinkClosed:
            if not member.ended:
                self._suspect(DIED, rank, "", member.block)
        except Exception as error:
            _log.exception("rank %d: its record could not be handled", rank)
            self._suspect(FAILED, rank, f"sent what could not be handled: {error}", member.block)

    def _accuse(self, rank: int, record: Record) -> None:
        """Take a worker's report of what has gone wrong."""
        kind = getattr(errors, record["error"], None)
        known = kind if isinstance(kind, type) and issubclass(kind, LiveAvatarError) else None
        what = "ran out of memory" if record["memory"] else record["message"]
        error = None if known is None or known is WorkerError else known(record["message"])
        self._suspect(LOST_PEER if record["lost_peer"] else FAILED, rank, what, record["block"], error)

    def _suspect(
        self, weight: int, rank: int, what: str, block: int = -1, error: LiveAvatarError | None = None
    ) -> None:
        with self._suspected:
            self._suspicions.append(Suspicion(weight, rank, what, block, error))
            self._suspected.notify_all()

    def _watch(self) -> None:
        """Wait for a worker to fail, find out which one it was, and end all of them."""
        while not self._closing.is_set():
            with self._suspected:
                if not self._suspicions:
                    self._suspected.wait(0.25)
                suspected = bool(self._suspicions)
            if suspected:
                time.sleep(_GRACE_SECONDS)
                if not self._closing.is_set():
                    self._fail(min(self._suspicions))
                return
            self._look_for_hangs()

    def _look_for_hangs(self) -> None:
        now, before = time.monotonic(), self._looked
        self._looked = now
        for rank, member in list(self._members.items()):
            if now - before > _PAUSE_SECONDS:
                member.last_beat = now  # its signs of life may be waiting to be read
            if now - member.last_beat > (LOADING_SECONDS if member.doing in _LOADING else SILENT_SECONDS):
                what = f"has given no sign of life for {now - member.last_beat:.1f} s"
                self._suspect(SILENT, rank, what, member.block)
            elif member.stuck:
                self._suspect(SILENT, rank, f"hangs: {member.busy:.1f} s in one block", member.block)

    def _fail(self, worst: Suspicion) -> None:
        plan = self.plan.ranks[worst.rank]
        what = worst.what or self._how_it_ended(worst.rank)
        member = self._members.get(worst.rank)
        at = "" if worst.block < 0 else f" at block {worst.block}"
        pid = "" if member is None else f", pid {member.info.pid}"
        message = f"rank {worst.rank} ({plan.stage} on {plan.device}{pid}){at}: {what}"
        failure = WorkerError(message, worst.rank, plan.stage, None if worst.block < 0 else worst.block)
        failure.__cause__ = worst.error
        _log.error("%s; all workers are ended", message)
        self._kill()
        self.failure = failure
        self._on_failure(failure)

    def _how_it_ended(self, rank: int) -> str:
        """What is known of a process that hung up."""
        process = next((process for process in self._processes if process.rank == rank), None)
        status = None if process is None else process.wait(1.0)
        if status is None:
            return "has hung up"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

    def _raise_failure(self) -> None:
        """Raise what a broken link is a sign of."""
        deadline = time.monotonic() + _END_SECONDS
        while self.failure is None and time.monotonic() < deadline and not self._closing.is_set():
            time.sleep(0.01)
        if self.failure is None:
            raise WorkerError("the engine's workers have been ended")
        cause = self.failure.__cause__
        if isinstance(cause, LiveAvatarError):
            raise type(cause)(str(self.failure)) from None
        raise self.failure

    def _kill(self, *, gently: bool = False) -> None:
        """End all processes; those that end by themselves get a moment."""
        running = [process for process in self._processes if not gently or process.wait(_END_SECONDS) is None]
        for process in running:
            process.kill()
        for member in list(self._members.values()):
            member.link.close()
        deadline = time.monotonic() + _KILL_SECONDS
        for process in running:
            if process.wait(max(0.0, deadline - time.monotonic())) is None:
                _log.error("rank %d: its process has been killed, but has not gone", process.rank)
        self._store = None
