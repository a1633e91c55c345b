"""Which devices a pipeline of the reference runs on: the one place that knows of GPUs and jobs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed

from ..errors import ConfigError
from ..pipeline.tpp.job import Job
from .ranks import Ranks


@dataclass(frozen=True)
class Layout:
    """Where a pipeline runs, and who gets its video.

    Attributes:
        devices: as `EngineConfig` names them; of several, each has a worker process.
        receiver: rank whose `generate` returns the video.
    """

    devices: tuple[str, ...]
    receiver: int = 0


def one_device(device_id: int) -> Layout:
    """A pipeline that needs no other process: on GPU `device_id`, or on the CPU where there is none."""
    return Layout((f"cuda:{device_id}" if torch.cuda.is_available() else "cpu",))


def processes() -> int:
    """Of the job that this process is part of, as scripts of the reference see it."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def pipeline_layout(device_id: int, ranks: Ranks | None, num_gpus_dit: int, enable_vae_parallel: bool) -> Layout:
    """A timestep-forcing pipeline.

    In a job, it has as many devices as processes, and the video goes where the reference returns it: the rank behind
    those that denoise or, without `enable_vae_parallel`, the last of them. One process uses as many GPUs as are asked
    for and there, from `device_id` on.

    Raises:
        ConfigError: the job has fewer processes than are asked for, or more than one node.
    """
    asked = num_gpus_dit + int(enable_vae_parallel)
    if ranks is None:
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = tuple(f"cuda:{index}" for index in range(device_id, min(device_id + asked, found)))
        return Layout(names) if names else one_device(device_id)
    job = Job.current()
    if job is not None and job.nodes > 1:
        raise ConfigError(f"a job on {job.nodes} nodes: scripts of the reference run on one; Engine joins several")
    if asked > ranks.count:
        raise ConfigError(
            f"num_gpus_dit={num_gpus_dit}, enable_vae_parallel={enable_vae_parallel} ask for {asked} processes; the "
            f"job has {ranks.count}: start it with --nproc_per_node={asked}"
        )
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return Layout(tuple(f"{kind}:{rank}" for rank in range(ranks.count)), receiver=asked - 1)
