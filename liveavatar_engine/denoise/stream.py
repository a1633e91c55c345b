"""Denoising a stream block by block: every step has a ring of its own, the sink is shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import StreamGeometry
from ..errors import ModelError
from ..model import Network
from ..model.attention import KeyValue
from ..model.network import BlockInputs, TimeModulation
from .caches import StreamCaches
from .noise import sink_distances
from .positions import StreamPositions
from .schedule import Schedule

Observer = Callable[[int, int, Tensor], None]
"""Called with block, step and velocity, for tests and tracing."""


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


class Denoiser:
    """A network with a schedule, and what each timestep contributes, computed once."""

    def __init__(self, network: Network, schedule: Schedule) -> None:
        self.network, self.schedule = network, schedule
        self.times: list[TimeModulation] = [network.time_modulation(timestep) for timestep in schedule.timesteps]


class LatentStream:
    """The latents of one session. Opening it prefills the sink; `next_block` takes blocks in order.

    Args:
        denoiser: network and schedule.
        geometry: of the stream.
        caches: the session's buffers, overwritten.
        text: cross-attention keys and values of the prompt, per layer.
        reference: latent of the image, [channels, 1, latent_height, latent_width].
        motion: motion latents [channels, frames, ...], oldest first; unused without motion tokens.
        policy: of the sink.
        actor_mask: [actors, frames, tokens_per_frame, 1] or None.
        first_frame: latent frame at which the stream starts.
        observe: called with every velocity.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        geometry: StreamGeometry,
        caches: StreamCaches,
        *,
        text: list[KeyValue],
        reference: Tensor,
        motion: Tensor | None,
        policy: SinkPolicy,
        actor_mask: Tensor | None = None,
        first_frame: int = 0,
        observe: Observer | None = None,
    ) -> None:
        self._denoiser, self._geometry, self._caches = denoiser, geometry, caches
        self._text, self._policy, self._actor_mask, self._observe = text, policy, actor_mask, observe
        self._motion = motion if geometry.motion_tokens else None
        wide = torch.float64 if denoiser.network.dtype == torch.float64 else torch.float32
        self._positions = StreamPositions(
            geometry, caches, denoiser.schedule.steps, denoiser.network.device, first_frame, wide
        )
        self._sink_view = self._positions.sink_view()
        self._first_latent: Tensor | None = None
        self.block = 0
        self._prefill(reference)

    @property
    def device(self) -> torch.device:
        return self._denoiser.network.device

    @torch.inference_mode()
    def next_block(self, noise: Tensor, audio_states: Tensor, pose: Tensor | None = None) -> Tensor:
        """Denoise the next block.

        Args:
            noise: [channels, frames, latent_height, latent_width].
            audio_states: wav2vec2 states [actors, audio_layers, audio_dim, columns_per_block].
            pose: pose latents [cond_dim, frames, latent_height, latent_width] or None.

        Returns:
            Latents of noise's shape, float32, on the network's device.

        Raises:
            ModelError: the first block is not finite.
        """
        network = self._denoiser.network
        if self._policy.update_after is not None and self.block == self._policy.update_after:
            assert self._first_latent is not None
            self._prefill(self._first_latent)
        inputs = BlockInputs(pose, network.audio_inputs(audio_states), self._actor_mask)
        latents = self._denoise(noise.to(network.device), inputs)
        if self.block == 0:
            self._check_finite(latents)
            self._first_latent = latents[:, :1].clone()
        self.block += 1
        return latents

    def _denoise(self, latents: Tensor, inputs: BlockInputs) -> Tensor:
        schedule, times = self._denoiser.schedule, self._denoiser.times
        distances = sink_distances(self._policy.distance, self._policy.seed, self.block, schedule.steps)
        for step, view in enumerate(self._positions.block_views(self.block, distances)):
            ring = self._caches.rings[step]
            velocity = self._denoiser.network(latents, times[step], self._text, inputs, ring, self._caches.sink, view)
            latents = latents + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * velocity
            if self._observe is not None:
                self._observe(self.block, step, velocity)
        return latents

    @torch.inference_mode()
    def _prefill(self, reference: Tensor) -> None:
        self._denoiser.network.prefill_sink(reference, self._motion, self._text, self._caches.sink, self._sink_view)

    def _check_finite(self, latents: Tensor) -> None:
        if torch.isfinite(latents).all():
            return
        bad = [name for name, weight in self._denoiser.network.named_parameters() if not weight.isfinite().all()]
        cause = (
            f"weights with NaN or infinity: {', '.join(bad[:10])}{' and more' if len(bad) > 10 else ''}"
            if bad
            else "all weights are finite: an input or the precision is the cause"
        )
        raise ModelError(f"block 0: the latents are not finite; {cause}")
