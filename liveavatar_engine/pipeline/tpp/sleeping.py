"""Stages that take their time and compute nothing: a pipeline's processes, links and buffers without a model."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...config import StreamGeometry
from ...config.geometry import LATENT_FRAME_STRIDE
from ...runtime.group import Group
from ...runtime.timing import StageTimer
from .plan import StageCosts
from .records import Record


class SleepingDenoising:
    """Steps that last `costs.step` each, shared by `mates`; latents count the steps that they have been through."""

    def __init__(self, costs: StageCosts, part: range, total: int, mates: int = 1) -> None:
        self.begins, self.ends = part.start == 0, part.stop == total
        self.group: Group | None = None
        self._costs, self._part, self._mates = costs, part, mates
        self._geometry: StreamGeometry | None = None
        self._unseen: set[int] = set()
        self._update_after: dict[int, int | None] = {}
        self._next: dict[int, int] = {}

    def warm_up(self, geometry: StreamGeometry, actors: int, masked: bool) -> None:
        self._geometry = geometry

    def open(self, session: int, record: Record) -> None:
        self._unseen.discard(session)
        self._update_after[session] = record["update_after"]
        self._next[session] = 0

    def block(self, session: int, record: Record, latents: Tensor | None) -> Tensor:
        assert self._geometry is not None
        if record["block"] == self._update_after.get(session):
            self.prepare(session)
        self._next[session] = record["block"] + 1
        time.sleep(self._costs.step * len(self._part) / self._mates)
        if self.ends and record["block"] == 0:
            self._unseen.add(session)
        entering = torch.zeros(self._geometry.block_shape) if latents is None else latents
        return entering + len(self._part)

    def change_prompt(self, session: int, context: Tensor) -> None:
        self._unseen.add(session)

    def show_first_latent(self, session: int, latent: Tensor) -> None:
        self._unseen.add(session)

    def prepare(self, session: int) -> int | None:
        """A prefill, if there is something new to be seen."""
        if session not in self._unseen:
            return None
        time.sleep(self._costs.prefill / self._mates)
        self._unseen.discard(session)
        return self._next[session]

    def close(self, session: int) -> None:
        self._unseen.discard(session)


class SleepingDecoding:
    """A decoder that takes `costs.decode` for a block; its frames show how many steps the latents went through."""

    def __init__(self, costs: StageCosts) -> None:
        self._costs = costs
        self._geometry: StreamGeometry | None = None

    def warm_up(self, geometry: StreamGeometry) -> None:
        self._geometry = geometry

    def open(self, session: int, record: Record) -> None:
        """Nothing is primed."""

    def start(self, session: int, latents: Tensor, timer: StageTimer) -> ReadyFrames:
        assert self._geometry is not None
        count, whole = latents.shape[1], self._geometry.frames_per_block
        rest = (self._costs.decode - self._costs.first_decode) * (count / max(1, whole - 1))
        with timer.stage("decode"):
            time.sleep(self._costs.decode if count == whole else self._costs.first_decode if count == 1 else rest)
        shape = (count * LATENT_FRAME_STRIDE, self._geometry.height, self._geometry.width, 3)
        return ReadyFrames(np.full(shape, int(latents.max()), np.uint8))

    def close(self, session: int) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class ReadyFrames:
    """Frames that need no waiting for."""

    frames: np.ndarray

    def wait(self) -> np.ndarray:
        return self.frames
