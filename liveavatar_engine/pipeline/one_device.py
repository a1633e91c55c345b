"""All steps and the decoder on one device, in the engine's own process."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from ..config import EngineConfig, StreamGeometry
from ..denoise.diagonal import open_stream
from ..denoise.executor import Denoiser, StepExecutor
from ..denoise.noise import BlockNoise
from ..denoise.schedule import flow_match_schedule
from ..errors import SessionError
from ..model import Network
from ..vae.light import LightDecoder
from ..vae.vae import Vae
from .decoders import Decoders
from .device import graphs_absent, resolve_precision
from .production import Production, ProductionParts
from .runner import Ending, StreamOrder, WorkerInfo


class OneDevice:
    """Makes blocks where the network is. `decoder` makes their frames.

    Attributes:
        network: the loaded one.
        model: its sizes.
        executor: what runs the denoise steps, once `warm_up` or a stream has made it.
        graphs: whether steps are captured as CUDA graphs.
    """

    def __init__(self, config: EngineConfig, network: Network, decoder: Vae | LightDecoder) -> None:
        self.network, self.model = network, network.config
        self.executor: StepExecutor | None = None
        self.graphs = config.graphs and graphs_absent(network.device) is None
        self._config = config
        self._cache_dtype = resolve_precision(config, network.device).cache
        schedule = flow_match_schedule(config.steps)
        self._denoiser = Denoiser(network, schedule, clean_pass=config.kv_mode == "clean")
        self._decoders = Decoders(decoder, network.device, self.graphs, config.frames)
        self._lock = threading.RLock()  # sessions may be collected, and give their slot back, while it is held
        self._free_slots = list(range(config.max_sessions))
        self._ending = Ending()

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def warm_up(self, geometry: StreamGeometry, actors: int, masked: bool) -> None:
        slot, executor = self._take_slot(geometry)
        try:
            executor.warm_up(actors, masked, slot)
            self._decoders.stream(geometry).close()
        finally:
            self._give_slot_back(slot)

    def open(self, order: StreamOrder) -> Production:
        slot, executor = self._take_slot(order.geometry)
        with ExitStack() as opened:
            opened.callback(self._give_slot_back, slot)
            latents = open_stream(executor, slot, order.conditions, order.policy)
            opened.callback(latents.close)
            decoder = self._decoders.stream(order.geometry)
            opened.callback(decoder.close)
            decoder.skip(order.priming)
            decoder.check()
            release = opened.pop_all().close
        parts = ProductionParts(
            order.geometry,
            order.features,
            BlockNoise(order.geometry, order.policy.seed),
            latents,
            decoder,
            order.pose,
            early_first_frame=self._config.early_first_frame,
            overlap=self.network.device.type == "cuda",
        )
        return Production(parts, order.max_blocks, release, self._ending)

    def workers(self) -> list[WorkerInfo]:
        return []

    @property
    def failure(self) -> None:
        """Nothing that could break stands between sessions and the device."""
        return None

    def drain(self) -> None:
        self._ending.draining.set()

    def close(self) -> None:
        """End all streams; their memory goes with the engine."""
        self._ending.close()

    def _take_slot(self, geometry: StreamGeometry) -> tuple[int, StepExecutor]:
        """A free slot, in buffers that are made at the first session and when the size changes between sessions."""
        with self._lock:
            self._ending.check()
            if self._ending.draining.is_set():
                raise SessionError("the engine is being drained: it opens no session")
            if not self._free_slots:
                raise SessionError(
                    f"all {self._config.max_sessions} sessions are open: close one, or set EngineConfig.max_sessions"
                )
            executor = self._executor_for(geometry)
            return self._free_slots.pop(), executor

    def _executor_for(self, geometry: StreamGeometry) -> StepExecutor:
        if self.executor is None or self.executor.geometry != geometry:
            if len(self._free_slots) < self._config.max_sessions:
                raise SessionError("sessions of another picture size are open; sizes cannot be mixed in an engine")
            self.executor = None
            self.executor = StepExecutor(
                self._denoiser,
                geometry,
                sessions=self._config.max_sessions,
                cache_dtype=self._cache_dtype,
                graphs=self.graphs,
                diagonal=self._config.schedule == "diagonal",
            )
        return self.executor

    def _give_slot_back(self, slot: int) -> None:
        with self._lock:
            self._free_slots.append(slot)
