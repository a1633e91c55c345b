"""A script of a torchrun job, as the reference's are: each rank makes a pipeline, generates, and goes on."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from compat.pipeline_calls import reference_config

from liveavatar_engine.compat import TppWanS2V
from liveavatar_engine.errors import InputError

checkpoint, image, audio, out = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="env://")
rank, save_rank = dist.get_rank(), 2
pipeline = TppWanS2V(reference_config(), checkpoint, device_id=rank, rank=rank)
arguments = {
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
refused = ""
try:
    pipeline.generate(**{**arguments, "ref_image_path": "nobody.png"})
except InputError as error:
    refused = str(error)
videos = [pipeline.generate(**arguments)[0] for _ in range(2)]
assert [video is not None for video in videos] == [rank == save_rank] * 2
engine = pipeline._backend.loaded
stages = [worker.stage for worker in engine.workers()] if engine is not None else None
told: list[object] = [None] * dist.get_world_size()
dist.all_gather_object(told, (refused, stages))
if rank == save_rank:
    torch.save({"videos": torch.stack(videos), "told": told}, out)
dist.barrier()
dist.destroy_process_group()
