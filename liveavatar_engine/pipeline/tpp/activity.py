"""What a worker is doing, as its front is told with every sign of life."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

IDLE, BLOCK, FULL = "idle", "block", "full"
"""Kinds of activities beside those named after other records: nothing to do, a block, and no room for what is done."""


@dataclass(frozen=True)
class Activity:
    """What is being done, since when (`time.monotonic`), and the session and block that it is, or was last, for.

    -1 stands for none.
    """

    kind: str = IDLE
    session: int = -1
    block: int = -1
    since: float = field(default_factory=time.monotonic)
