"""What a user starts with torchrun: every rank runs it, and none of its lines says which one it is on."""

from __future__ import annotations

import sys

import numpy as np
import torch

from liveavatar_engine import Engine, EngineConfig

checkpoint, out, *devices = sys.argv[1:]
torch.set_num_threads(1)
config = EngineConfig(size="64x64", devices=tuple(devices) or "auto")
with Engine.from_pretrained(checkpoint, config=config) as engine:
    stages = [worker.stage for worker in engine.workers()]
    pids = {worker.pid for worker in engine.workers()}
    face = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    samples = np.random.default_rng(0).standard_normal(16_000 * 3).astype(np.float32)
    frames = [np.concatenate([chunk.frames for chunk in engine.generate(face, samples, seed=2)])]
    if len(devices) > 1 or not devices:
        engine.restart()
        assert pids != {worker.pid for worker in engine.workers()}
        frames.append(np.concatenate([chunk.frames for chunk in engine.generate(face, samples, seed=2)]))
np.savez(out, frames=np.stack(frames), stages=stages)
sys.stdout.write(f"the first rank has written {out}\n")
