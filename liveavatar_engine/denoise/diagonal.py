"""Several blocks under way at once: step j of block i together with step j - 1 of block i + 1, as one call.

Timestep forcing makes them independent of each other: a block attends only to keys of its own noise level. So the
latents are those of the sequential schedule, in larger products; a block is finished `steps` calls after it came.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.engine import SINK_DISTANCES
from .executor import StepExecutor
from .positions import Place
from .stream import Conditions, LatentStream, Observer, SinkPolicy, _Block


class DiagonalStream(LatentStream):
    """A `LatentStream` whose blocks overlap; the only one of its executor, in whose buffers blocks under way lie."""

    def __init__(
        self,
        executor: StepExecutor,
        session: int,
        conditions: Conditions,
        policy: SinkPolicy,
        *,
        first_frame: int = 0,
        observe: Observer | None = None,
    ) -> None:
        super().__init__(executor, session, conditions, policy, first_frame=first_frame, observe=observe)
        self._at_step: list[_Block | None] = [None] * executor.steps
        self._no_noise = torch.zeros(self.geometry.block_shape)
        self._still = [SINK_DISTANCES[0]] * executor.steps

    def push(self, noise: Tensor, audio_states: Tensor, pose: Tensor | None = None) -> list[Tensor]:
        """Take the next block, and take one step with each block under way.

        Before a block that is to see the first block's latents in the sink, that one is finished first.
        """
        finished = []
        with self._executor.exclusive():
            while not self._admits_next():
                finished += self._take_steps(self._no_noise)
            self._at_step[0] = self._enter(audio_states, pose)
            finished += self._take_steps(noise)
        return finished

    def drain(self) -> list[Tensor]:
        finished = []
        with self._executor.exclusive():
            while any(self._at_step):
                finished += self._take_steps(self._no_noise)
        return finished

    def _admits_next(self) -> bool:
        update_after = self._policy.update_after
        if update_after is not None and self.block >= update_after and self._first_latent is None:
            return False
        return self._scenes.arrive(self.block, [block.scene for block in self._at_step if block])

    def _take_steps(self, noise: Tensor) -> list[Tensor]:
        """One step of all blocks under way; returns the latents of the one that it finishes."""
        active = [step for step, block in enumerate(self._at_step) if block]
        self._executor.place([self._place_of(step) for step in range(self._executor.steps)], noise)
        self._executor.run(self._cast, active[0], active[-1])
        for step, block in enumerate(self._at_step):
            if block and self._observe is not None:
                self._observe(block.index, step, self._executor.velocity(step))
        last = self._at_step[-1]
        self._at_step = [None, *self._at_step[:-1]]
        finished = [] if last is None else [self._finish(last.index)]
        self._scenes.advance(self.block, 0, 1, [block.scene for block in self._at_step if block])
        return finished

    def _place_of(self, step: int) -> Place:
        """Where the step's block stands; without one, where the next one will, and overwrites what is written there."""
        block = self._at_step[step]
        if block is None:
            earlier = [other.index for other in self._at_step[:step] if other]
            block = _Block(min(earlier, default=self.block), self._still, self._scenes.current)
        return self._place(block, step)


def open_stream(
    executor: StepExecutor,
    session: int,
    conditions: Conditions,
    policy: SinkPolicy,
    *,
    first_frame: int = 0,
    observe: Observer | None = None,
) -> LatentStream:
    """A new stream in the schedule that the executor was made for; arguments as for `LatentStream`."""
    kind = DiagonalStream if executor.diagonal else LatentStream
    return kind(executor, session, conditions, policy, first_frame=first_frame, observe=observe)
