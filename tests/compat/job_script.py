"""A script of a torchrun job, as the reference's are: each rank makes pipelines, generates, and goes on."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from compat.pipeline_calls import LiveSource, reference_config

from liveavatar_engine.compat import BlockwiseWanS2V, TppWanS2V
from liveavatar_engine.errors import LiveAvatarError

checkpoint, image, audio, out = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="env://")
rank, save_rank = dist.get_rank(), 2
arguments: dict[str, Any] = {
    "input_prompt": "a person talks",
    "ref_image_path": image,
    "audio_path": audio,
    "num_repeat": 1,
    "max_area": 64 * 64,
    "infer_frames": 48,
    "sample_solver": "euler",
    "sampling_steps": 2,
    "seed": 7,
    "num_gpus_dit": 2,
    "enable_vae_parallel": True,
}


def gathered(mine: object) -> list[Any]:
    """What every rank has."""
    told: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


def refusal(generate: Any, **changes: object) -> str:
    """What an error of `generate` says on this rank."""
    try:
        list(generate(**{**arguments, **changes}))
    except LiveAvatarError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def hang_up() -> None:
    raise ValueError("nobody there")


pipeline = TppWanS2V(reference_config(), checkpoint, device_id=rank, rank=rank)
refused = [refusal(pipeline.generate, ref_image_path="nobody.png")]
video, _ = pipeline.generate(**arguments)
assert (video is not None) == (rank == save_rank)

live = BlockwiseWanS2V(reference_config(), checkpoint, device_id=rank, rank=rank)
live._backend = pipeline._backend  # the same workers: to start others takes its time
refused.append(refusal(live.generate, infer_frames=80))
live.get_audio_callback = hang_up if rank == 0 else None
refused.append(refusal(live.generate))
live.get_audio_callback = hang_up if rank == save_rank else None
refused.append(refusal(live.generate))
first: list[Any] = []
if rank == save_rank:
    live.get_audio_callback = LiveSource(audio, 7680)
for chunk in live.generate(**arguments):
    first.append(chunk)
    if rank == 1 and len(first) == 2:
        break
if rank == save_rank:
    live.get_audio_callback = LiveSource(audio, 7680)
whole = list(live.generate(**arguments))

engine = pipeline._backend.loaded
stages = [worker.stage for worker in engine.workers()] if engine is not None else None
counts = [len(chunks) for chunks in (first, whole)]
told = gathered((refused, stages, counts, [chunk is not None for chunk in whole]))
if rank == save_rank:
    torch.save({"video": video, "first": first, "whole": whole, "told": told}, out)
dist.barrier()
dist.destroy_process_group()
