"""Timesteps and noise levels of the denoise steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TRAIN_TIMESTEPS = 1000
SHIFT = 3.0


@dataclass(frozen=True)
class Schedule:
    """One timestep (0..1000) per step, and the noise level sigma (0..1) before each step and after the last."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def deltas(self) -> tuple[float, ...]:
        """What each step adds to the noise level; an Euler step adds delta * velocity to the latents."""
        return tuple(after - before for before, after in zip(self.sigmas, self.sigmas[1:], strict=False))

    def part(self, steps: range) -> Schedule:
        """The schedule of some neighbouring steps."""
        return Schedule(self.timesteps[steps.start : steps.stop], self.sigmas[steps.start : steps.stop + 1])

    def with_clean_pass(self) -> Schedule:
        """The schedule with a last evaluation of the finished latents at time 0, which leaves them as they are."""
        return Schedule((*self.timesteps, 0.0), (*self.sigmas, self.sigmas[-1]))


def flow_match_schedule(steps: int, shift: float = SHIFT) -> Schedule:
    """The schedule of diffusers' FlowMatchEulerDiscreteScheduler(1000, shift).set_timesteps(steps).

    That class applies `sigma -> shift * sigma / (1 + (shift - 1) * sigma)` twice: to its table of training sigmas,
    whose ends span the timesteps, and to the sigmas of these. Values are rounded to float32 as there.
    """
    ends = np.array([TRAIN_TIMESTEPS, 1], dtype=np.float32) / np.float32(TRAIN_TIMESTEPS)
    highest, lowest = (float(sigma) for sigma in _shifted(ends, shift))
    sigmas = _shifted(np.linspace(highest, lowest, steps), shift).astype(np.float32)
    timesteps = sigmas * np.float32(TRAIN_TIMESTEPS)
    return Schedule(tuple(timesteps.tolist()), (*sigmas.tolist(), 0.0))


def _shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return shift * sigmas / (1 + (shift - 1) * sigmas)
