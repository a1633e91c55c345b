"""Timestep-forcing pipeline parallel: denoise steps and decoding on several devices, each with a process of its own."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

from ... import errors
from ...config import EngineConfig, ModelConfig, StreamGeometry
from ...config.geometry import LATENT_FRAME_STRIDE
from ...errors import LiveAvatarError, SessionError, WorkerError
from ..runner import Ending, StreamOrder, WorkerInfo
from .crew import Crew
from .launch import Launcher
from .plan import Lane, Plan
from .producer import Berth, Gate, PipelineProducer
from .records import Record
from .setup import Progress, Weights, WorkerSetup
from .shared_frames import SharedFrames
from .trace import Span

_SLACK = 2
"""Blocks of a stream under way beside one per stage: what two buffers between stages hold."""
_CLOSING_SECONDS = 60.0
"""For a closed stream's last blocks to leave the pipeline before its slot is given to another one."""


class ManyDevices:
    """Makes blocks in the worker processes of a plan.

    Args:
        plan: who does what.
        config: settled, with the plan's devices.
        weights: where workers load from.
        model: sizes of the network.
        launcher: how processes come to be.
        device: that the engine's own process encodes conditions on.
        progress: called while networks are loaded.
        trace: whether workers collect spans.

    Raises:
        LiveAvatarError: what a worker could not do; none is left running.
    """

    def __init__(
        self,
        plan: Plan,
        config: EngineConfig,
        weights: Weights,
        model: ModelConfig,
        launcher: Launcher,
        device: torch.device,
        *,
        progress: Progress | None = None,
        trace: bool = False,
    ) -> None:
        self.plan, self.model = plan, model
        self._config, self._weights, self._launcher, self._device = config, weights, launcher, device
        self._trace = trace
        self._numbers = itertools.count()
        self._crew = self._start(progress)

    def _start(self, progress: Progress | None = None) -> Crew:
        streams = self._streams = _Streams(self._config.max_sessions, self.plan)
        self._geometry: StreamGeometry | None = None
        self._frames: dict[int, SharedFrames] = {}
        crew = Crew(
            self.plan, self._launcher, streams.dispatch, streams.fail, streams.ending.draining.set, trace=self._trace
        )
        streams.relay = partial(_relay, crew, self.plan)
        crew.start(self._setups, progress)
        return crew

    def _setups(self, workers: Mapping[int, WorkerInfo]) -> list[WorkerSetup]:
        sessions = -(-self._config.max_sessions // len(self.plan.lanes))
        threads = torch.get_num_threads()
        return [WorkerSetup(rank, self._config, self._weights, sessions, threads) for rank in self.plan.ranks]

    @property
    def free_slots(self) -> int:
        return self._streams.free_slots

    @property
    def failure(self) -> WorkerError | None:
        """Why no worker is left, once one has failed."""
        return self._crew.failure

    def workers(self) -> list[WorkerInfo]:
        return self._crew.workers()

    def restart(self) -> None:
        """Start all workers again, after one has failed, or at any other time: sessions that are open end.

        Raises:
            LiveAvatarError: what a worker could not do; none is left running.
        """
        self.close()
        self._crew = self._start()

    def warm_up(self, geometry: StreamGeometry, actors: int, masked: bool) -> None:
        with self._streams.opening:
            if self._geometry == geometry:
                return
            geometry.heads_per_rank(self._config.sequence_parallel)
            if not self._streams.idle():
                raise SessionError("sessions of another picture size are open; sizes cannot be mixed in an engine")
            self._geometry, self._frames = None, {}
            try:
                for lane in self.plan.lanes:
                    here = [rank.rank for rank in lane.decoders if self._crew.is_here(rank.rank)]
                    self._frames |= {rank: SharedFrames.create(*self._slots(lane, geometry)) for rank in here}
                records = {rank.rank: self._warm_up(rank.rank, geometry, actors, masked) for rank in self.plan.ranks}
                self._crew.ask_all(records, "warmed")
            finally:
                for frames in self._frames.values():
                    frames.forget()
            self._geometry = geometry

    def _warm_up(self, rank: int, geometry: StreamGeometry, actors: int, masked: bool) -> Record:
        fields: dict[str, object] = {
            "height": geometry.height,
            "width": geometry.width,
            "frames_per_block": geometry.frames_per_block,
            "ring_frames": geometry.ring_frames,
            "motion_tokens": geometry.motion_tokens,
            "actors": actors,
            "masked": masked,
        }
        if rank in self._frames:
            frames = self._frames[rank]
            fields["frames"] = [str(frames.path), frames.slots, frames.slot_bytes]
        return Record("warm_up", fields)

    def _slots(self, lane: Lane, geometry: StreamGeometry) -> tuple[int, int]:
        """Slots for the frames of a lane's streams, and bytes of each."""
        sessions = -(-self._config.max_sessions // len(self.plan.lanes))
        frames = geometry.frames_per_block * LATENT_FRAME_STRIDE
        return sessions * self._window(lane), frames * geometry.height * geometry.width * 3

    def _window(self, lane: Lane) -> int:
        """Slots of a stream: blocks under way, and one more where the first block comes in two parts."""
        return lane.depth + _SLACK + self._config.early_first_frame

    def open(self, order: StreamOrder) -> PipelineProducer:
        mask = order.conditions.actor_mask
        if self._crew.failure is not None:
            raise SessionError(f"the engine has lost its workers; restart() starts them again: {self._crew.failure}")
        streams = self._streams
        slot = streams.reserve()
        try:
            with streams.opening:
                self.warm_up(order.geometry, 1 if mask is None else len(mask), mask is not None)
                berth = self._berth(slot)
                producer = PipelineProducer(
                    order, berth, self._config.early_first_frame, streams.ending.draining, self._device
                )
                streams.add(slot, berth.stream, producer)
            producer.start()
        except BaseException:
            streams.release(slot)
            raise
        return producer

    def _berth(self, slot: int) -> Berth:
        """A stream's place: lanes take turns, and within a lane its decoders."""
        lanes = self.plan.lanes
        lane, session = lanes[slot % len(lanes)], slot // len(lanes)
        window = self._window(lane)
        decoder = lane.decoders[session % len(lane.decoders)].rank
        return Berth(
            session,
            next(self._numbers),
            range(session * window, (session + 1) * window),
            self._streams.gates[slot % len(lanes)],
            partial(self._crew.send, lane.stages[0][0].rank),
            partial(_read, self._frames.get(decoder)),
        )

    def spans(self) -> list[Span]:
        """What the workers have done since the last call, if they are traced."""
        return self._crew.spans()

    def drain(self) -> None:
        self._streams.ending.draining.set()

    def close(self) -> None:
        self._streams.ending.close()
        self._streams.fail(SessionError("the engine is closed"))
        self._streams.wait_until_idle(_CLOSING_SECONDS if self._crew.failure is None else 0)
        self._crew.close()


class _Streams:
    """The streams of an engine, by number; what workers say of them is handed to them."""

    def __init__(self, slots: int, plan: Plan) -> None:
        self.gates = [Gate() for _ in plan.lanes]
        self._plan = plan
        self.ending = Ending()
        self.opening = threading.RLock()  # from a warm-up until the stream that wanted it is here
        self.relay: Callable[[Record, int], None] = lambda record, slot: None
        self._slots = slots
        self._changed = threading.Condition(threading.RLock())
        self._free = list(range(slots))
        self._open: dict[int, tuple[int, PipelineProducer]] = {}
        self._failure: LiveAvatarError | None = None

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def idle(self) -> bool:
        """Whether no stream is open, but for one that is being opened; those that are leaving are waited for."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or not any(producer.leaving for _, producer in self._open.values()),
                _CLOSING_SECONDS,
            )
            return not self._open

    def reserve(self) -> int:
        """A slot; one that a closed stream is about to leave is waited for.

        Raises:
            SessionError: there is none, or the engine is closed.
        """
        with self._changed:
            self.ending.check()
            if self.ending.draining.is_set():
                raise SessionError("the engine is being drained: it opens no session")
            leaving = any(producer.leaving for _, producer in self._open.values())
            if not self._free and leaving:
                self._changed.wait_for(lambda: bool(self._free) or self._failure is not None, _CLOSING_SECONDS)
            if not self._free:
                raise SessionError(f"all {self._slots} sessions are open: close one, or set EngineConfig.max_sessions")
            return self._free.pop(0)

    def add(self, slot: int, stream: int, producer: PipelineProducer) -> None:
        """A stream in a slot that has been reserved."""
        with self._changed:
            self._open[stream] = slot, producer

    def release(self, slot: int) -> None:
        """A slot is free again, and the stream in it, if any, is gone."""
        with self._changed:
            self._open = {stream: found for stream, found in self._open.items() if found[0] != slot}
            self._free.append(slot)
            self._changed.notify_all()

    def dispatch(self, rank: int, record: Record) -> None:
        """Hand a worker's record to the stream that it is about."""
        if record.kind == "credit":
            self.gates[self._plan.ranks[rank].lane].leave()
            return
        with self._changed:
            found = self._open.get(record["stream"])
            if found is None:
                return
            slot, producer = found
            if record.kind == "closed":
                self.release(slot)
                return
        if record.kind == "chunk":
            producer.take(record)
        elif record.kind == "first_latent":
            self.relay(record, slot)
            producer.take_first_latent()
        elif record.kind == "session_failed":
            kind = getattr(errors, record["error"])
            producer.fail(kind(f"rank {rank}, block {record['block']}: {record['message']}"))

    def fail(self, error: LiveAvatarError) -> None:
        """Tell all streams that nothing more will come."""
        with self._changed:
            if not isinstance(self._failure, WorkerError):
                self._failure = error
            producers = [producer for _, producer in self._open.values()]
            self._changed.notify_all()
        for producer in producers:
            producer.fail(error)

    def wait_until_idle(self, seconds: float) -> None:
        """Wait until the pipeline has let go of all streams, or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open or isinstance(self._failure, WorkerError), seconds)


def _relay(crew: Crew, plan: Plan, record: Record, slot: int) -> None:
    """Send the first generated latent around, from the lane's first stage on."""
    crew.send(plan.lanes[slot % len(plan.lanes)].stages[0][0].rank, record)


def _read(frames: SharedFrames | None, slot: int, shape: tuple[int, ...]) -> np.ndarray:
    assert frames is not None
    return frames.read(slot, shape)
