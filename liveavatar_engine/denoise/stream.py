"""The latents of one session: blocks in order, each through all denoise steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import StreamGeometry
from ..errors import ModelError
from .executor import StepExecutor
from .noise import sink_distances
from .positions import Place, Scene
from .prefill import SinkContents

Observer = Callable[[int, int, Tensor], None]
"""Called with block, step and velocity, for tests and measurements. The velocity is overwritten by the next step."""

PROMPT_BLOCKS = 2
"""Blocks over which a new prompt's sink is prefilled, so that none of them takes much longer than others."""


@dataclass(frozen=True)
class SinkPolicy:
    """How the sink moves and when it changes.

    Attributes:
        distance: "random" or a fixed distance in latent frames.
        update_after: blocks after which the first generated latent frame becomes the reference; None: never.
        seed: of the random distances.
    """

    distance: str | int
    update_after: int | None
    seed: int


@dataclass(frozen=True)
class Conditions:
    """What a stream shows, as the network reads it.

    Attributes:
        context: of the prompt, [tokens, text_dim].
        reference: latent of the image, [channels, 1, latent_height, latent_width].
        motion: motion latents [channels, frames, ...], oldest first; unused without motion tokens.
        actor_mask: [actors, frames or 1, tokens_per_frame, 1], or None for a single actor without a mask.
    """

    context: Tensor
    reference: Tensor
    motion: Tensor | None = None
    actor_mask: Tensor | None = None


@dataclass(frozen=True)
class _Block:
    """A block under way."""

    index: int
    distances: list[int]
    scene: Scene


class LatentStream:
    """The latents of one session. Opening it prefills the sink; then it takes blocks in order.

    Args:
        executor: with the buffers of all sessions.
        session: whose, 0 to the executor's sessions - 1.
        conditions: what it shows.
        policy: of the sink.
        first_frame: latent frame at which the stream starts.
        observe: called with every velocity.
    """

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
        self._executor, self._session = executor, session
        self._policy, self._first_frame, self._observe = policy, first_frame, observe
        self._mask = conditions.actor_mask
        self._motion = conditions.motion if executor.geometry.motion_tokens else None
        actors = 1 if self._mask is None else len(self._mask)
        self._cast = executor.cast(actors, self._mask is not None, session)
        self._first_latent: Tensor | None = None
        self.block = 0
        """The next block to be taken."""
        with executor.exclusive():
            contents = SinkContents(conditions.reference, self._motion)
            self._scenes = executor.scenes(session, contents, conditions.context)

    @property
    def device(self) -> torch.device:
        return self._executor.denoiser.network.device

    @property
    def geometry(self) -> StreamGeometry:
        return self._executor.geometry

    @property
    def scene(self) -> Scene:
        """What the block taken last sees besides its ring."""
        return self._scenes.current

    def next_block(self, noise: Tensor, audio_states: Tensor, pose: Tensor | None = None) -> Tensor:
        """Denoise the next block.

        Args:
            noise: [channels, frames, latent_height, latent_width], on the CPU.
            audio_states: wav2vec2 states [actors, audio_layers, audio_dim, columns_per_block].
            pose: pose latents [cond_dim, frames, latent_height, latent_width] or None.

        Returns:
            Latents of noise's shape, float32, on the network's device.

        Raises:
            ModelError: the first block is not finite.
            InputError: audio states of another shape.
        """
        (latents,) = self.push(noise, audio_states, pose)
        return latents

    def push(self, noise: Tensor, audio_states: Tensor, pose: Tensor | None = None) -> list[Tensor]:
        """Take the next block, as `next_block`; returns the latents of blocks that are finished now, in order.

        Where the executor takes only some of the steps, what comes in place of noise, and what is returned, are
        latents as the steps before and here leave them.
        """
        executor, steps = self._executor, self._executor.steps
        with executor.exclusive():
            self._scenes.arrive(self.block)
            block = self._enter(audio_states, pose)
            executor.place([self._place(block, step) for step in range(steps)], noise)
            for step in range(steps):
                executor.run(self._cast, step, step)
                if self._observe is not None:
                    self._observe(block.index, step, executor.velocity(step))
                self._scenes.advance(block.index, step, steps)
            return [self._finish(block.index)]

    def drain(self) -> list[Tensor]:
        """Finish the blocks that are under way; returns their latents, in order."""
        return []

    def show_first_latent(self, latent: Tensor) -> None:
        """Let the sink show the first generated latent, [channels, 1, latent_height, latent_width], when it is time.

        Where the last step is taken elsewhere, it must come before the block that is to see it.
        """
        with self._executor.exclusive():
            self._first_latent = latent.clone()
            if self._policy.update_after is not None:
                self._scenes.replace_contents(self._policy.update_after, SinkContents(self._first_latent, self._motion))

    def show(self, reference: Tensor, motion: Tensor) -> None:
        """Let the sink show another reference, [channels, 1, ...], and motion latents from the next block on."""
        with self._executor.exclusive():
            self._motion = motion if self.geometry.motion_tokens else None
            self._scenes.replace_contents(self.block, SinkContents(reference, self._motion))

    def prepare(self) -> bool:
        """Finish now what the next block waits for at its start, if all it depends on is there; False: nothing was."""
        with self._executor.exclusive():
            return self._scenes.prepare(self.block)

    def change_prompt(self, context: Tensor) -> None:
        """Let another prompt, [tokens, text_dim], count: at once for the first block, later within a few blocks.

        Raises:
            InputError: a context that does not fit the network.
        """
        with self._executor.exclusive():
            self._executor.prompts.check(context)
            block, update = self.block + (PROMPT_BLOCKS if self.block else 0), self._policy.update_after
            if update is not None and self.block <= update <= block:
                block = update  # one prefill for both
            self._scenes.replace_prompt(block, context)

    def close(self) -> None:
        """Leave unfinished what only this stream would have read."""
        with self._executor.exclusive():
            self._scenes.close()

    def _enter(self, audio_states: Tensor, pose: Tensor | None) -> _Block:
        """Take a block's inputs and give it its number."""
        self._cast.enter(audio_states, pose, self._mask)
        part, total = self._executor.denoiser.part, self._executor.denoiser.total
        distances = sink_distances(self._policy.distance, self._policy.seed, self.block, total)
        block = _Block(self.block, distances[part.start : part.stop], self._scenes.current)
        self.block += 1
        return block

    def _place(self, block: _Block, step: int) -> Place:
        frame = self._first_frame + block.index * self.geometry.frames_per_block
        ring = self._executor.arena.ring_slot(self._session, step)
        return Place(ring, block.index, frame, block.distances[step], block.scene)

    def _finish(self, block: int) -> Tensor:
        """The latents that the last step has left; the first block's become the next reference."""
        latents = self._executor.finished()
        if block == 0 and self._executor.denoiser.ends:
            self._check_finite(latents)
            self.show_first_latent(latents[:, :1])
        return latents

    def _check_finite(self, latents: Tensor) -> None:
        if torch.isfinite(latents).all():
            return
        parameters = self._executor.denoiser.network.named_parameters()
        bad = [name for name, weight in parameters if not weight.isfinite().all()]
        cause = (
            f"weights with NaN or infinity: {', '.join(bad[:10])}{' and more' if len(bad) > 10 else ''}"
            if bad
            else "all weights are finite: an input or the precision is the cause"
        )
        raise ModelError(f"block 0: the latents are not finite; {cause}")
