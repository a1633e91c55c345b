"""What a front knows of a worker, and what may speak against it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import LiveAvatarError
from ..runner import WorkerInfo
from .activity import BLOCK
from .link import Link
from .plan import RankPlan
from .records import Record

STUCK_SECONDS = 8.0
"""In one block on a GPU, after which a worker counts as hanging, if no block before took a fourth of it.

How long a CPU takes says nothing.
"""
FIRST_BLOCK_SECONDS = 60.0
"""The same before a worker has finished any block, and it is not known how long one takes."""


@dataclass
class Member:
    """A worker.

    Attributes:
        last_beat: when it gave a sign of life (`time.monotonic`).
        doing, block, busy: what it said then: its activity, the block, and for how many seconds.
        longest: that it said of a block which it has finished since; None: it has finished none.
    """

    plan: RankPlan
    link: Link
    info: WorkerInfo
    last_beat: float
    doing: str = "starting"
    block: int = -1
    busy: float = 0.0
    longest: float | None = None
    ended: bool = False

    def hear(self, beat: Record) -> None:
        """Take a sign of life."""
        another = beat["block"] != self.block
        if beat["block"] > 0 or (another and self.block >= 0):
            self.longest = max(self.longest or 0.0, self.busy if another and self.doing == BLOCK else 0.0)
        self.doing, self.block, self.busy = beat["doing"], beat["block"], beat["seconds"]

    @property
    def stuck(self) -> bool:
        """Whether a GPU has been in one block for too long."""
        if self.doing != BLOCK or not self.plan.device.startswith("cuda"):
            return False
        return self.busy > (FIRST_BLOCK_SECONDS if self.longest is None else max(STUCK_SECONDS, 4 * self.longest))


@dataclass(frozen=True, order=True)
class Suspicion:
    """What speaks against a worker; the most telling comes first."""

    weight: int
    rank: int
    what: str = field(compare=False)
    block: int = field(compare=False, default=-1)
    error: LiveAvatarError | None = field(compare=False, default=None)


DIED, FAILED, SILENT, LOST_PEER = range(4)
"""Weights of suspicions."""
