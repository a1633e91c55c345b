"""Loading an engine's parts to where they work: one device, or the workers of a plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from ..config import EngineConfig
from ..errors import ConfigError
from ..weights.budget import expected_geometry, require_room
from ..weights.memory import Share
from ..weights.network import LoadProgress
from .device import local_name, log_kernels, resolve_device
from .encoders import Encoders
from .one_device import OneDevice
from .runner import Runner
from .source import Files, RandomWeights, Source
from .tpp.job import Job
from .tpp.launch import Launcher, Spawn
from .tpp.many_devices import ManyDevices
from .tpp.plan import Plan, StageCosts, make_plan
from .tpp.setup import Weights

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """An engine's parts, and its configuration as the checkpoint has settled it."""

    config: EngineConfig
    runner: Runner
    encoders: Encoders


def assemble(
    source: Files | RandomWeights,
    config: EngineConfig,
    progress: LoadProgress | None,
    job: Job | None,
    *,
    trace: bool,
) -> Parts:
    """Load what a configuration asks for, after everything has been checked that can be.

    Where there is a `job` and several devices, its processes are the workers.

    Raises:
        CheckpointError, ConfigError, DeviceMemoryError: see `Engine.from_pretrained`.
    """
    names = device_names(config, job)
    if len(names) > 1:
        if job is not None and job.rank > 0:
            job.serve()
            raise SystemExit(0)
        return _on_many(source, config, names, job, progress, trace)
    if trace:
        raise ConfigError("trace: a timeline is drawn of several devices; this engine has one")
    if config.sequence_parallel > 1:
        raise ConfigError(f"sequence_parallel={config.sequence_parallel} needs as many devices; there is one")
    return _on_one(source, config, resolve_device(names), progress)


def device_names(config: EngineConfig, job: Job | None) -> tuple[str, ...]:
    """The devices of a configuration, by rank where there are several.

    Raises:
        ConfigError: one does not exist, two are the same, or a torchrun job has another number of processes.
    """
    if isinstance(config.devices, str):
        if job is None or job.world_size == 1:
            return (str(resolve_device("auto")),)
        return job.device_names()
    if len(config.devices) == 1:
        return config.devices
    if job is not None and job.world_size not in (1, len(config.devices)):
        raise ConfigError(
            f"devices: {len(config.devices)} are named, and torchrun has started {job.world_size} processes: "
            "each needs a device of its own"
        )
    seen: dict[str, str] = {}
    for name in config.devices:
        local = local_name(name)
        device = torch.device(local) if local != name else resolve_device((local,))
        known = name if device.type == "cpu" or local != name else str(device)
        if known in seen:
            raise ConfigError(f"devices: {seen[known]!r} and {name!r} are the same")
        seen[known] = name
    if len({torch.device(local_name(name)).type for name in config.devices}) > 1:
        raise ConfigError(f"devices: expected GPUs or CPUs, not both: {', '.join(config.devices)}")
    return config.devices


def choose_plan(config: EngineConfig, names: tuple[str, ...]) -> Plan:
    """Who does what on these devices.

    Raises:
        ConfigError: some of them would have nothing to do.
    """
    step, decode = config.stage_ms
    return make_plan(
        names,
        config.steps,
        StageCosts.of(step, decode),
        sequence_parallel=config.sequence_parallel,
        max_sessions=config.max_sessions,
    )


def _on_one(source: Source, config: EngineConfig, device: torch.device, progress: LoadProgress | None) -> Parts:
    log_kernels(device)
    config = source.settled(config)
    require_room(expected_geometry(source.model(), config), source.sizes(), config, device)
    _log.info("loading %s on %s", source.name, device)
    encoders = source.encoders(config, device)
    decoder = encoders.vae if source.vae is None else source.decoder(config, device)
    return Parts(config, OneDevice(config, source.network(config, device, progress), decoder), encoders)


def _on_many(
    source: Files | RandomWeights,
    config: EngineConfig,
    names: tuple[str, ...],
    job: Job | None,
    progress: LoadProgress | None,
    trace: bool,
) -> Parts:
    config.check_for_several_devices()
    plan = choose_plan(config, names)
    config, model = source.settled(replace(config, devices=names)), source.model()
    geometry = expected_geometry(model, config)
    geometry.heads_per_rank(config.sequence_parallel)
    device = encoding_device(plan, len(names) if job is None else job.local_world_size)
    require_room(geometry, source.sizes(), config, device, Share(encodes=True, sessions=config.max_sessions))
    _log.info("loading %s on %s", source.name, ", ".join(f"{rank.device}: {rank.stage}" for rank in plan.ranks))
    encoders = source.encoders(config, device)
    launcher: Launcher = Spawn() if job is None or job.world_size == 1 else job
    runner = ManyDevices(plan, config, Weights.of(source), model, launcher, device, progress=progress, trace=trace)
    return Parts(config, runner, encoders)


def encoding_device(plan: Plan, here: int) -> torch.device:
    """Where the engine's own process encodes conditions: beside the first decoder of this machine's `here` ranks.

    Raises:
        ConfigError: there is no such device.
    """
    decoders = [rank for rank in plan.ranks if rank.decoder is not None and rank.rank < here]
    return resolve_device((local_name((decoders[0] if decoders else plan.ranks[here - 1]).device),))
