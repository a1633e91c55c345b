"""One geometry's denoise steps on one device: static buffers, and the work of each step, recorded once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..config import StreamGeometry
from ..model import Network
from ..model.network import TimeModulation
from ..model.sequence import token_splits
from ..runtime.graphs import Recorder, Work, recorder
from ..runtime.group import Group
from .caches import CacheArena
from .cast import Cast, side_by_side
from .positions import Place, Scene, StepPositions
from .prefill import SinkContents, SinkPrefill
from .prompts import Prompts
from .scenes import Scenes
from .schedule import Schedule

_log = logging.getLogger(__name__)


class Denoiser:
    """A network with a schedule, and what each timestep contributes, computed once.

    Args:
        network: in its final precision.
        schedule: of the denoise steps.
        clean_pass: whether keys and values come from one more evaluation, of finished latents at time 0, and all steps
            share its ring; otherwise each step has a ring of its own ("timestep forcing").
        part: the steps that are taken here, where others are taken elsewhere; None: all.

    Attributes:
        schedule: of all evaluations that are made here.
        part: which of all they are.
        total: evaluations of a block, wherever they are made.
        time: of the timesteps here.
        sink_time: of the sink's timestep, 0.
        rings: per session.
    """

    def __init__(
        self, network: Network, schedule: Schedule, *, clean_pass: bool = False, part: range | None = None
    ) -> None:
        every = schedule.with_clean_pass() if clean_pass else schedule
        self.network, self.total = network, every.steps
        self.part = range(every.steps) if part is None else part
        self.schedule = every.part(self.part)
        self.rings = 1 if clean_pass else self.schedule.steps
        with torch.inference_mode():
            self.time: TimeModulation = network.time_modulation(self.schedule.timesteps)
            self.sink_time: TimeModulation = network.time_modulation((0.0,))

    @property
    def begins(self) -> bool:
        """Whether blocks enter here as noise; otherwise as latents that an earlier step has left."""
        return self.part.start == 0

    @property
    def ends(self) -> bool:
        """Whether blocks leave as finished latents."""
        return self.part.stop == self.total

    @property
    def wide(self) -> torch.dtype:
        """Of latents, angles and noise: float32, or float64 for a network in float64."""
        return torch.float64 if self.network.dtype == torch.float64 else torch.float32


class StepExecutor:
    """Runs the steps of all sessions of one geometry, a block at a time.

    Step j takes latents from row j of a buffer and leaves them, one step further, in row j + 1. So one block can go
    through all steps in turn, or several blocks, each at another step, can take one step together.

    Args:
        denoiser: network and schedule.
        geometry: of all streams.
        sessions: that can be open at a time.
        cache_dtype: of rings and sinks; None: the network's.
        graphs: capture CUDA graphs where the device has them.
        diagonal: record calls of several steps, for streams that run them together.
        record_with: what records work, in place of that which `graphs` asks for.
        group: of the ranks that share every step, each with an executor of its own; None: this one computes alone.

    Raises:
        ConfigError: the group's size does not divide the heads and a frame's tokens.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        geometry: StreamGeometry,
        *,
        sessions: int = 1,
        cache_dtype: torch.dtype | None = None,
        graphs: bool = True,
        diagonal: bool = False,
        record_with: Recorder | None = None,
        group: Group | None = None,
    ) -> None:
        split, sink_split = token_splits(geometry, group)
        network, steps, wide = denoiser.network, denoiser.schedule.steps, denoiser.wide
        self.denoiser, self.geometry, self.diagonal, self.steps = denoiser, geometry, diagonal, steps
        self._split = split
        device = network.device
        self.arena = CacheArena(
            geometry, denoiser.rings, sessions, cache_dtype or network.dtype, network.dtype, device, split.ranks
        )
        self._positions = StepPositions(geometry, self.arena.layout, steps, device, wide, split, noise=denoiser.begins)
        self.prompts = Prompts(network, self.arena)
        self._prefill = SinkPrefill(network, geometry, self.arena, denoiser.sink_time, wide, sink_split)
        self._recorder = record_with or recorder(device, graphs, urgent=True)
        self._lock = threading.RLock()
        self._casts: dict[tuple[int, bool], Cast] = {}
        self._latents = torch.zeros(steps + 1, *geometry.block_shape, dtype=wide, device=device)
        self._velocity = torch.zeros(steps, *geometry.block_shape, dtype=wide, device=device)
        self._deltas = torch.tensor(denoiser.schedule.deltas, dtype=wide).to(device)[:, None, None, None, None]

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """A block's time: nothing else uses the buffers, and work goes where it is replayed."""
        with self._lock, torch.inference_mode(), self._recorder.stream():
            yield

    def warm_up(self, actors: int = 1, masked: bool = False, session: int = 0) -> None:
        """Record all work for streams of so many actors, with or without masks; once done, nothing is left to do.

        Kernels are compiled and chosen here. Until then no stream of `session` may be open: its slots are written.
        """
        if (actors, masked) in self._casts:
            return
        started = time.perf_counter()
        with self.exclusive():
            slot = self.arena.scene_slots(session)[0]
            scene = Scene(slot, slot, 0, self.geometry.model.text_len)
            if not self._casts:
                self._prefill.record(self._recorder, scene)
            places = [Place(self.arena.ring_slot(session, step), 0, 0, 4, scene) for step in range(self.steps)]
            self.place(places, torch.zeros(self.geometry.block_shape))
            rows = self.steps if self.diagonal else 1
            cast = Cast(self.denoiser.network, self.geometry, actors, masked, rows, self._split)
            cast.record(self._recorder, self._ranges(), self._work)
            self._casts[actors, masked] = cast
        _log.info("recorded the steps for %d actors in %.2f s", actors, time.perf_counter() - started)

    def cast(self, actors: int, masked: bool, session: int) -> Cast:
        """What is recorded for so many actors; records it if need be."""
        self.warm_up(actors, masked, session)
        return self._casts[actors, masked]

    def scenes(self, session: int, contents: SinkContents, context: Tensor) -> Scenes:
        """The scenes of a new stream, the first of them prefilled."""
        return Scenes(self.prompts, self._prefill, self.arena.scene_slots(session), contents, context)

    def place(self, places: Sequence[Place], entering: Tensor) -> None:
        """Say where each step stands from now on, and bring what enters the first one.

        That is noise on the CPU, or the latents of an earlier step.
        """
        if self.denoiser.begins:
            self._positions.write(places, entering)
        else:
            self._positions.write(places)
            self._latents[0].copy_(entering)

    def run(self, cast: Cast, first: int, last: int) -> None:
        """Take steps `first` to `last`, both included, at once; each takes the latents that the one before it left."""
        first, last = self._covering(first, last)
        cast.steps[first, last]()

    def velocity(self, step: int) -> Tensor:
        """What the step computed last: [channels, frames, latent_height, latent_width], overwritten by the next."""
        return self._velocity[step]

    def finished(self) -> Tensor:
        """Latents that the last step has left: float32 [channels, frames, latent_height, latent_width]."""
        return self._recorder.hand_out(self._latents[-1].clone())

    def _ranges(self) -> list[tuple[int, int]]:
        """First and last steps of the calls that are recorded."""
        last = self.steps - 1
        if not self.diagonal:
            return [(step, step) for step in range(self.steps)]
        beginnings = [(0, step) for step in range(self.steps)]
        return beginnings + [(step, last) for step in range(1, self.steps)]

    def _covering(self, first: int, last: int) -> tuple[int, int]:
        """The shortest recorded range around some steps; others in it do work that nobody reads."""
        around = [(a, b) for a, b in self._ranges() if a <= first and last <= b]
        return min(around, key=lambda steps: steps[1] - steps[0])

    def _work(self, cast: Cast, first: int, last: int) -> Work:
        """One network call for some steps, and their Euler steps x + (sigma_next - sigma) v."""
        steps, later = slice(first, last + 1), slice(first + 1, last + 2)
        frames = self.geometry.frames_per_block
        view, modulation = self._positions.view(steps), self.denoiser.time[steps]
        caches, network = self.arena.layers, self.denoiser.network
        inputs = cast.inputs(steps)
        takes_noise = first == 0 and self.denoiser.begins

        def work() -> None:
            if takes_noise:
                self._latents[0].copy_(self._positions.noise)
            latents = self._latents[steps]
            velocity = network(side_by_side(latents, 1), modulation, inputs(), caches, view)
            by_step = velocity.unflatten(1, (-1, frames)).movedim(1, 0)
            self._velocity[steps].copy_(by_step)
            self._latents[later].copy_(latents + self._deltas[steps] * by_step)
            cast.pass_on(steps)

        return work
