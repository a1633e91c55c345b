"""A golden `dit` case through `CausalWanModel_S2V`, called as the reference's pipelines call theirs."""

from __future__ import annotations

from typing import Any

import torch
from support import GoldenCase
from torch import Tensor

from liveavatar_engine.compat import CausalWanModel_S2V


class ReferenceLoop:
    """Caches of every step, and the calls that fill and read them. Latents are rounded nowhere."""

    def __init__(self, case: GoldenCase, model: CausalWanModel_S2V, sink_room: int = 2800) -> None:
        self.case, self.model = case, model
        parameters = case.parameters
        model.sink_distance = parameters["relative_dist"]
        self.frames = parameters["frames_per_block"]
        self.tokens = parameters["lat_h"] * parameters["lat_w"] // 4
        heads = (model.config.num_heads, model.config.head_dim)
        ring = self.tokens * parameters["window_frames"]
        self.rings = [
            [
                {
                    "k": torch.zeros(1, ring, *heads),
                    "v": torch.zeros(1, ring, *heads),
                    "cond_k": torch.zeros(1, sink_room, *heads),
                    "cond_v": torch.zeros(1, sink_room, *heads),
                    "cond_end": torch.tensor([0]),
                }
                for _ in range(model.num_layers)
            ]
            for _ in case["timesteps"]
        ]
        self.reference = case["ref_latents"]
        self.velocities: dict[tuple[int, int], Tensor] = {}

    def run(self, blocks: int | None = None) -> list[Tensor]:
        """Latents of every block."""
        made: list[Tensor] = []
        for block in range(blocks or self.case.parameters["num_blocks"]):
            if block == 0:
                self.prefill()
            elif block == self.case.parameters.get("aas_after"):
                self.reference = made[0][None, :, :1]
                self.prefill()
            made.append(self.denoise(block))
        return made

    def prefill(self) -> None:
        for ring in self.rings:
            self.model(
                [self.case["noise"][:, : self.frames]],
                t=torch.zeros(1, self.frames),
                **self.conditions(0),
                sink_flag=True,
                kv_cache=ring,
                crossattn_cache=None,
                current_start=0,
                current_end=self.tokens * self.frames,
            )

    def denoise(self, block: int) -> Tensor:
        latents = self.case["noise"][:, block * self.frames : (block + 1) * self.frames]
        sigmas, start = self.case["sigmas"], block * self.frames * self.tokens
        for step, timestep in enumerate(self.case["timesteps"]):
            (velocity,) = self.model(
                [latents],
                t=timestep.repeat(1, self.frames),
                **self.conditions(block),
                kv_cache=self.rings[step],
                crossattn_cache=None,
                current_start=start,
                current_end=start + self.frames * self.tokens,
                mask=self.case.tensors.get("actor_mask"),
            )
            self.velocities[block, step] = velocity
            latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
        return latents

    def conditions(self, block: int) -> dict[str, Any]:
        frames = slice(block * self.frames, (block + 1) * self.frames)
        return {
            "context": [self.case["context"]],
            "seq_len": None,
            "cond_states": self.case["cond_states"][:, :, frames],
            "motion_latents": self.case["motion_latents"],
            "ref_latents": self.reference,
            "audio_input": self.case["audio"][..., 4 * frames.start : 4 * frames.stop],
            "motion_frames": [73, 19],
            "drop_motion_frames": False,
        }
