"""Filling a sink layer by layer, so that it can be done between the steps of blocks that still read another one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import StreamGeometry
from ..config.geometry import MOTION_LATENTS
from ..model import Network
from ..model.network import TimeModulation
from ..model.residual import Residual
from ..model.sequence import TokenSplit
from ..runtime.graphs import Recorder, Work
from .caches import CacheArena
from .positions import Scene, SinkPositions


@dataclass(frozen=True)
class SinkContents:
    """What a sink shows: latents of the reference [channels, 1, height, width], and of the motion before the stream."""

    reference: Tensor
    motion: Tensor | None


@dataclass(eq=False)
class PrefillJob:
    """A sink to be filled.

    Attributes:
        scene: which one, and the prompt that its tokens read.
        contents: what it is to show.
        left: pieces of work that remain.
    """

    scene: Scene
    contents: SinkContents
    left: int


class SinkPrefill:
    """Fills one sink at a time, at time 0 and base positions.

    Between layers the stream of tokens waits in buffers, so every layer is one piece of recorded work. Ranks that share
    a timestep share this, too: each has a part of the tokens, and fills the caches of its heads.
    """

    def __init__(
        self,
        network: Network,
        geometry: StreamGeometry,
        arena: CacheArena,
        time: TimeModulation,
        wide: torch.dtype,
        split: TokenSplit,
    ) -> None:
        model, device = network.config, network.device
        frame = (model.in_dim, 1, geometry.latent_height, geometry.latent_width)
        self._network, self._layers, self._time, self._split = network, arena.sink_layers, time, split
        self._reference = torch.zeros(frame, dtype=wide, device=device)
        motion = (frame[0], MOTION_LATENTS, *frame[2:])
        self._motion = torch.zeros(motion, dtype=wide, device=device) if geometry.motion_tokens else None
        self._x, self._branch = (
            torch.zeros(split.count(geometry.sink_tokens), model.dim, dtype=network.dtype, device=device)
            for _ in range(2)
        )
        self._positions = SinkPositions(geometry, arena.layout, device, wide, split)
        self._view = self._positions.view()
        self._job: PrefillJob | None = None
        self._stages: list[Work] = []

    def record(self, recorder: Recorder, scene: Scene) -> None:
        """Make the work of every layer repeatable; it writes to the sink of `scene`."""
        self._positions.write(scene)
        works = [self._embed, *(self._layer_work(index) for index in range(len(self._layers)))]
        self._stages = [recorder.record(work) for work in works]

    def job(self, scene: Scene, contents: SinkContents) -> PrefillJob:
        """A job of which nothing is done yet."""
        return PrefillJob(scene, contents, len(self._stages))

    def advance(self, job: PrefillJob, pieces: int) -> None:
        """Do some of a job, if anything of it is left; one that another stream has begun is finished first."""
        if not job.left:
            return
        if job is not self._job:
            if self._job is not None:
                self._run(self._job, self._job.left)
            self._begin(job)
        self._run(job, pieces)

    def drop(self, sinks: range) -> None:
        """Give up what remains of a job for one of these sinks."""
        if self._job is not None and self._job.scene.sink in sinks:
            self._job = None

    def _begin(self, job: PrefillJob) -> None:
        self._reference.copy_(job.contents.reference)
        if self._motion is not None:
            assert job.contents.motion is not None
            frames = min(job.contents.motion.shape[1], MOTION_LATENTS)
            self._motion.zero_()
            self._motion[:, MOTION_LATENTS - frames :].copy_(job.contents.motion[:, -frames:])
        self._positions.write(job.scene)
        self._job, job.left = job, len(self._stages)

    def _run(self, job: PrefillJob, pieces: int) -> None:
        first = len(self._stages) - job.left
        for stage in self._stages[first : first + pieces]:
            stage()
            job.left -= 1
        if not job.left:
            self._job = None

    def _embed(self) -> None:
        self._x.copy_(self._split.mine(self._network.sink_tokens(self._reference, self._motion)))

    def _layer_work(self, index: int) -> Work:
        block = self._network.layers()[index]
        modulation = self._time.blocks[index]
        gate = self._time.blocks[index - 1][-1] if index else None

        def work() -> None:
            stream = Residual(self._x, self._branch if index else None, gate)
            stream = block(stream, modulation, self._layers[index], self._view)
            assert stream.branch is not None
            self._x.copy_(stream.x)
            self._branch.copy_(stream.branch)

        return work
