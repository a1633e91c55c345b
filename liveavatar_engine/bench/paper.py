"""Figures of the paper, arXiv:2512.04677v4 (720x400 on H800), to stand beside what this machine does.

Its figures of quality need the published weights and their test set; they are quoted, never measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv:2512.04677v4, 720x400, H800 GPUs"


@dataclass(frozen=True)
class Published:
    """A row of the paper's Table 3 (speed) or 6 (quality), or of both.

    Attributes:
        gpus, evaluations: used, and network calls per block.
        fps, ttff: of Table 3; seconds.
        optimised_fps, optimised_ttff: with its kernel optimisations, FP8 among them; of Table 3's last row.
        flicker, identity: T.Flicker and Dino-S of Table 6, higher is better.
    """

    gpus: int | None = None
    evaluations: int | None = None
    fps: float | None = None
    ttff: float | None = None
    optimised_fps: float | None = None
    optimised_ttff: float | None = None
    flicker: float | None = None
    identity: float | None = None


TIMESTEP_FORCING = Published(flicker=0.971, identity=0.97)
CLEAN_CACHE = Published(gpus=1, evaluations=5, fps=3.66, ttff=4.56, flicker=0.876, identity=0.90)
SEQUENCE_PARALLEL = Published(gpus=4, evaluations=5, fps=4.50, ttff=3.94)
TPP_WITHOUT_VAE_DEVICE = Published(gpus=4, evaluations=4, fps=10.16, ttff=4.73)
TPP = Published(gpus=5, evaluations=4, fps=20.88, ttff=2.89, optimised_fps=45.2, optimised_ttff=1.21)
