"""A torchrun job of the reference: every process runs the same script, and only one of them is to get the video.

The first process embeds the engine, which has worker processes of its own on all GPUs; what the reference's other ranks
would compute, those do. The ranks wait, without touching a GPU, and the video goes to the one that saves it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from .. import errors
from ..errors import LiveAvatarError

_FOREVER = timedelta(days=365)
_PIECE_FRAMES = 48


class Ranks:
    """The processes of the job, on the CPU. All must make one at the same time.

    Attributes:
        rank: of this process.
        count: of processes.
    """

    def __init__(self) -> None:
        self._group = distributed.new_group(backend="gloo", timeout=_FOREVER)
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    def video(self, make: Callable[[], Tensor], receiver: int) -> Tensor | None:
        """Let the first rank make a video, float32 [3, frames, height, width], and `receiver` have it.

        Returns:
            The video at the receiver, None elsewhere.

        Raises:
            LiveAvatarError: on all ranks, what went wrong on the first.
        """
        if self.rank:
            return self._receive(receiver)
        try:
            video = make()
        except BaseException as error:
            self._tell({"error": type(error).__name__, "message": str(error)})
            raise
        self._tell({"shape": list(video.shape)})
        if receiver == 0:
            return video
        for piece in video.split(_PIECE_FRAMES, dim=1):
            distributed.send(piece.contiguous(), receiver, group=self._group)
        return None

    def _receive(self, receiver: int) -> Tensor | None:
        told = self._tell(None)
        if "error" in told:
            kind = getattr(errors, told["error"], LiveAvatarError)
            raise kind(f"rank 0: {told['message'] or told['error']}")
        if self.rank != receiver:
            return None
        video = torch.zeros(told["shape"])
        for piece in video.split(_PIECE_FRAMES, dim=1):
            part = torch.zeros(piece.shape)
            distributed.recv(part, 0, group=self._group)
            piece.copy_(part)
        return video

    def _tell(self, told: dict[str, Any] | None) -> dict[str, Any]:
        """What the first rank tells all others."""
        box = [told]
        distributed.broadcast_object_list(box, src=0, group=self._group)
        assert box[0] is not None
        return box[0]
