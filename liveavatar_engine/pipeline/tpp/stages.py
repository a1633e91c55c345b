"""What a worker does for the sessions of its lane: some of the denoise steps, or decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...config import EngineConfig, StreamGeometry
from ...denoise.executor import Denoiser, StepExecutor
from ...denoise.noise import BlockNoise
from ...denoise.schedule import flow_match_schedule
from ...denoise.stream import Conditions, LatentStream, SinkPolicy
from ...model import Network
from ...runtime.group import Group
from ...runtime.timing import StageTimer
from ...vae.delivery import FrameDecoder, Pending
from ...vae.light import LightDecoder
from ...vae.vae import Vae
from ..decoders import Decoders
from ..device import graphs_absent, resolve_precision
from .records import Record


class Denoising(Protocol):
    """Some of the steps of every block."""

    begins: bool
    """Whether blocks enter as noise."""
    ends: bool
    """Whether they leave as finished latents."""
    group: Group | None
    """Ranks that share the steps, set before the first `warm_up`; None: there is one."""

    def warm_up(self, geometry: StreamGeometry, actors: int, masked: bool) -> None:
        """Allocate and record everything for streams of this geometry; none of another one is open."""
        ...

    def open(self, session: int, record: Record) -> None:
        """Begin a stream, and prefill its sink."""
        ...

    def block(self, session: int, record: Record, latents: Tensor | None) -> Tensor:
        """Take the next block of a stream through the steps; `latents` are those of the steps before, if any."""
        ...

    def change_prompt(self, session: int, context: Tensor) -> None:
        """Let another prompt count, from the same block on in every stage."""
        ...

    def show_first_latent(self, session: int, latent: Tensor) -> None:
        """What the last step of block 0 has left."""
        ...

    def prepare(self, session: int) -> int | None:
        """Do now what a coming block would wait for; returns that block, or None when there was nothing to do."""
        ...

    def close(self, session: int) -> None:
        """End a stream."""
        ...


class Decoding(Protocol):
    """The frames of every block."""

    def warm_up(self, geometry: StreamGeometry) -> None:
        """Allocate and record everything for pictures of this size."""
        ...

    def open(self, session: int, record: Record) -> None:
        """Begin a stream, primed with the portrait."""
        ...

    def start(self, session: int, latents: Tensor, timer: StageTimer) -> Pending:
        """Start to decode the next latents of a stream."""
        ...

    def close(self, session: int) -> None:
        """End a stream."""
        ...


class ModelDenoising:
    """Steps `part` of the network's schedule, for up to `sessions` streams."""

    def __init__(self, network: Network, config: EngineConfig, part: range, sessions: int) -> None:
        self._denoiser = Denoiser(network, flow_match_schedule(config.steps), part=part)
        self.begins, self.ends = self._denoiser.begins, self._denoiser.ends
        self._config, self._sessions, self._device = config, sessions, network.device
        self._graphs = config.graphs and graphs_absent(network.device) is None
        self._executor: StepExecutor | None = None
        self.group: Group | None = None
        self._streams: dict[int, LatentStream] = {}
        self._noise: dict[int, BlockNoise] = {}

    def warm_up(self, geometry: StreamGeometry, actors: int, masked: bool) -> None:
        if self._executor is None or self._executor.geometry != geometry:
            self._executor = None
            self._executor = StepExecutor(
                self._denoiser,
                geometry,
                sessions=self._sessions,
                cache_dtype=resolve_precision(self._config, self._device).cache,
                graphs=self._graphs,
                group=self.group,
            )
        self._executor.warm_up(actors, masked)

    def open(self, session: int, record: Record) -> None:
        assert self._executor is not None
        named = {name: tensor.to(self._device) for name, tensor in record.tensors.items()}
        conditions = Conditions(named["context"], named["reference"], named.get("motion"), named.get("actor_mask"))
        policy = SinkPolicy(record["distance"], record["update_after"], record["seed"])
        self._streams[session] = LatentStream(self._executor, session, conditions, policy)
        if self.begins:
            self._noise[session] = BlockNoise(self._executor.geometry, record["seed"])

    def block(self, session: int, record: Record, latents: Tensor | None) -> Tensor:
        entering = self._noise[session].block(record["block"]) if latents is None else latents
        states, pose = self._arrived(record.tensors["states"]), record.tensors.get("pose")
        pose = None if pose is None else self._arrived(pose)
        (finished,) = self._streams[session].push(entering, states, pose)
        if self.begins:
            self._noise[session].prepare(record["block"] + 1)
        return finished

    def change_prompt(self, session: int, context: Tensor) -> None:
        self._streams[session].change_prompt(context)

    def show_first_latent(self, session: int, latent: Tensor) -> None:
        self._streams[session].show_first_latent(self._arrived(latent))

    def prepare(self, session: int) -> int | None:
        stream = self._streams[session]
        return stream.block if stream.prepare() else None

    def close(self, session: int) -> None:
        self._noise.pop(session, None)
        stream = self._streams.pop(session, None)
        if stream is not None:
            stream.close()

    def _arrived(self, tensor: Tensor) -> Tensor:
        """A tensor of a record, on its way to the device; the host does not wait."""
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


class ModelDecoding:
    """The VAE's decoder, or a light one."""

    def __init__(self, decoder: Vae | LightDecoder, config: EngineConfig, device: torch.device) -> None:
        self._device = device
        self._decoders = Decoders(decoder, device, config.graphs and graphs_absent(device) is None, "host")
        self._geometry: StreamGeometry | None = None
        self._streams: dict[int, FrameDecoder] = {}

    def warm_up(self, geometry: StreamGeometry) -> None:
        self._decoders.stream(geometry).close()
        self._geometry = geometry

    def open(self, session: int, record: Record) -> None:
        assert self._geometry is not None
        stream = self._decoders.stream(self._geometry)
        self._streams[session] = stream
        stream.skip(record.tensors["priming"].to(self._device))
        stream.check()

    def start(self, session: int, latents: Tensor, timer: StageTimer) -> Pending:
        return self._streams[session].start(latents, timer)

    def close(self, session: int) -> None:
        stream = self._streams.pop(session, None)
        if stream is not None:
            stream.close()


def pieces(latents: Tensor, counts: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Latents [channels, frames, ...] in pieces of so many frames, each with the frame that it begins with."""
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return list(zip(starts, latents.split(list(counts), dim=1), strict=True))
