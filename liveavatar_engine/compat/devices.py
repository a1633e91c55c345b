"""Which devices a pipeline of the reference runs on: the one place that knows of jobs of several processes."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import distributed

from ..errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Where a pipeline runs, and who gets its video.

    Attributes:
        devices: as `EngineConfig` names them.
        gets_video: whether `generate` of this process returns the video; others return None.
    """

    devices: tuple[str, ...]
    gets_video: bool


def one_device(device_id: int, rank: int) -> Layout:
    """A pipeline that needs no other process: on GPU `device_id`, or on the CPU where there is none.

    As in the reference, the video goes to rank 0.
    """
    return Layout((_device(device_id),), gets_video=rank == 0)


def pipeline_over_job(device_id: int, num_gpus_dit: int, enable_vae_parallel: bool) -> Layout:
    """A timestep-forcing pipeline over all processes of this job.

    The reference denoises on ranks 0 to num_gpus_dit - 1 and, with `enable_vae_parallel`, decodes on the next one,
    which gets the video.

    Raises:
        ConfigError: the job has several processes, which this version does not join.
    """
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if processes > 1:
        raise ConfigError(
            f"a job of {processes} processes: this version of the backend runs in one; start it with --nproc_per_node=1"
        )
    asked = num_gpus_dit + int(enable_vae_parallel)
    if asked > 1:
        _log.info("the layout asks for %d GPUs; this process does all steps and the decoding on its own", asked)
    return Layout((_device(device_id),), gets_video=True)


def _device(device_id: int) -> str:
    return f"cuda:{device_id}" if torch.cuda.is_available() else "cpu"
