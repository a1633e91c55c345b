"""Both sides of a comparison, each from weights to latents; one process runs one side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...config.engine import REFERENCE_FP8_SKIP
from ...denoise.executor import Denoiser, StepExecutor
from ...denoise.schedule import flow_match_schedule
from ...denoise.stream import Conditions, LatentStream, SinkPolicy
from ...model import Network
from ...pipeline.device import Precision, resolve_precision
from ...weights.network import NetworkBuilder
from ..bench import Marks
from . import patches, reference
from .checkout import Checkout
from .inputs import StreamInputs, weights
from .job import REFERENCE, SINK_DISTANCE, UPDATE_AFTER, Job, Measured
from .stand_ins import StandInLog

LATENTS, VELOCITY = "latents", "velocity"
UNROUNDED = "unrounded "
"""In front of what the reference computes without its own roundings."""


def run_side(job: Job) -> tuple[Measured, dict[str, Tensor]]:
    """Run a side of a comparison.

    Returns:
        Its times, and what it computed, float32 on the CPU: LATENTS [blocks, channels, frames, height, width] and
        VELOCITY, of the first block, [steps, channels, frames, height, width]; the reference in float32 also both
        UNROUNDED.

    Raises:
        InputError: the reference cannot be run.
        CheckpointError: of weights that do not fit.
    """
    device = torch.device(job.settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(job.threads)
    precision = resolve_precision(job.settings.engine_config(), device)
    inputs = StreamInputs.draw(job.settings.geometry(), job.blocks, job.settings.seed, precision.dtype)
    run = _reference if job.side == REFERENCE else _engine
    return run(job, device, precision, inputs)


@dataclass
class _Recording:
    """Takes the time of steps, and keeps what they compute."""

    job: Job
    device: torch.device
    step_ms: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._marks = Marks(self.device)

    def begin(self) -> None:
        """A block begins."""
        self._marks = Marks(self.device)
        self._marks.mark()

    def step(self, block: int, step: int, velocity: Tensor) -> None:
        """A step is done."""
        if block == 0:
            self.velocities.append(velocity.to("cpu", torch.float32, copy=True))
        self._marks.mark()

    def end(self, block: int, latents: Tensor) -> None:
        """A block is done."""
        laps = self._marks.intervals_ms()
        if block >= self.job.settings.warm_up:
            self.step_ms += laps
        self.latents.append(latents.to("cpu", torch.float32, copy=True))

    def blocks(self, take: Callable[[int], Tensor]) -> None:
        """Take all blocks of the job."""
        for block in range(self.job.blocks):
            self.begin()
            self.end(block, take(block))

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        return {prefix + LATENTS: torch.stack(self.latents), prefix + VELOCITY: torch.stack(self.velocities)}

    def measured(self, log: StandInLog | None = None) -> Measured:
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return Measured(tuple(self.step_ms), peak, () if log is None else log.used)


def _engine(
    job: Job, device: torch.device, precision: Precision, inputs: StreamInputs
) -> tuple[Measured, dict[str, Tensor]]:
    settings, recording = job.settings, _Recording(job, device)
    network = _network(job, device, precision)
    executor = StepExecutor(
        Denoiser(network, flow_match_schedule(settings.steps)),
        settings.geometry(),
        cache_dtype=precision.cache,
        graphs=settings.graphs,
    )
    executor.warm_up()
    stream = LatentStream(
        executor,
        0,
        Conditions(inputs.context.to(device, network.dtype), inputs.reference, inputs.motion),
        SinkPolicy(SINK_DISTANCE, UPDATE_AFTER, settings.seed),
        observe=recording.step,
    )
    recording.blocks(lambda block: stream.next_block(inputs.noise[block], inputs.audio[block]))
    stream.close()
    return recording.measured(), recording.tensors()


@torch.inference_mode()
def _network(job: Job, device: torch.device, precision: Precision) -> Network:
    builder = NetworkBuilder(job.settings.model(), precision.dtype, device, precision.fp8_skip)
    for name, tensor in weights(job.settings, device, precision.dtype):
        builder.put(name, tensor)
    return builder.network


def _reference(
    job: Job, device: torch.device, precision: Precision, inputs: StreamInputs
) -> tuple[Measured, dict[str, Tensor]]:
    settings, log, recording = job.settings, StandInLog(), _Recording(job, device)
    dtype = torch.float32 if job.reference_precision == "fp32" else torch.bfloat16
    skip = REFERENCE_FP8_SKIP if job.reference_precision == "fp8" else None
    checkout = Checkout.find(job.checkout)
    with (
        reference.imported(checkout, device, dtype, job.compiled, log) as module,
        patches.sink_distance(SINK_DISTANCE, log),
    ):
        model = reference.ReferenceModel(
            module, settings.model(), weights(settings, device, dtype), device, dtype, skip, log
        )

        def take_all(into: _Recording) -> None:
            schedule, geometry = flow_match_schedule(settings.steps), settings.geometry()
            stream = reference.ReferenceStream(model, geometry, schedule, inputs, UPDATE_AFTER, into.step)
            into.blocks(stream.block)

        take_all(recording)
        tensors, measured = recording.tensors(), recording.measured(log)
        if dtype == torch.float32 and not job.compiled:
            again = _Recording(job, device)
            with patches.unrounded():
                take_all(again)
            tensors |= again.tensors(UNROUNDED)
    return measured, tensors
