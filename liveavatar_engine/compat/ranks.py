"""A torchrun job of the reference: every process runs the same script, and only one of them is to get the video.

The first process embeds the engine, which has worker processes of its own on all GPUs; what the reference's other ranks
would compute, those do. The ranks wait, without touching a GPU, and frames go to the one that shows or saves them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from .. import errors
from ..errors import LiveAvatarError

_FOREVER = timedelta(days=365)
_PIECE_FRAMES = 48
_Made = TypeVar("_Made")


class Ranks:
    """The processes of the job, on the CPU. All must make one, and call its methods, at the same time.

    Attributes:
        rank: of this process.
        count: of processes.
        calls: the group in which one rank calls another's callback, from any thread.
    """

    def __init__(self) -> None:
        self._group, self.calls = (distributed.new_group(backend="gloo", timeout=_FOREVER) for _ in range(2))
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    def first(self, make: Callable[[], _Made]) -> _Made | None:
        """Let the first rank make something, which it alone gets.

        Raises:
            LiveAvatarError: on all ranks, what went wrong on the first.
        """
        if self.rank:
            told = self._tell(None)
            if told is not None:
                raise as_error(0, told)
            return None
        try:
            made = make()
        except BaseException as error:
            self._tell(as_told(error))
            raise
        self._tell(None)
        return made

    def which(self, flag: bool) -> list[int]:
        """The ranks that say yes."""
        flags = torch.zeros(self.count, dtype=torch.uint8)
        flags[self.rank] = flag
        distributed.all_reduce(flags, group=self._group)
        return flags.nonzero().flatten().tolist()

    def video(self, make: Callable[[], Tensor], receiver: int) -> Tensor | None:
        """Let the first rank make a video, float32 [3, frames, height, width], and `receiver` have it.

        Returns:
            The video at the receiver, None elsewhere.

        Raises:
            LiveAvatarError: as `first`.
        """
        video = self.first(make)
        shape = self._shape(video)
        assert shape is not None
        return self._hand_over(video, shape, receiver)

    def chunks(self, made: Generator[Tensor] | None, receiver: int) -> Generator[Tensor | None]:
        """Let `receiver` have the chunks that the first rank makes, float32 [1, 3, frames, height, width].

        All ranks iterate, and a chunk is made when all of them want it: where one leaves, the stream ends for all.

        Args:
            made: the first rank's chunks, None elsewhere.
            receiver: who gets them.

        Yields:
            The chunks at the receiver, as many None elsewhere.

        Raises:
            LiveAvatarError: as `first`.
        """
        stay = True
        try:
            while stay:
                chunk = self.first(lambda: next(made, None) if made else None)
                shape = self._shape(chunk)
                if shape is None:
                    return
                given, stay = self._hand_over(chunk, shape, receiver), False
                try:
                    yield given
                    stay = True
                finally:
                    stay = self._all_stay(stay)
        finally:
            if made is not None:
                made.close()

    def _all_stay(self, stay: bool) -> bool:
        """Whether every rank goes on; a job that has ended asks nobody."""
        return distributed.is_initialized() and len(self.which(stay)) == self.count

    def _shape(self, frames: Tensor | None) -> list[int] | None:
        """Of the first rank's frames, None if it has none."""
        shape: list[int] | None = self._tell(None if frames is None else list(frames.shape))
        return shape

    def _hand_over(self, frames: Tensor | None, shape: list[int], receiver: int) -> Tensor | None:
        """Frames [..., frames, height, width] of the first rank, at the receiver."""
        if receiver == 0:
            return frames
        if frames is not None:
            for piece in frames.split(_PIECE_FRAMES, dim=-3):
                distributed.send(piece.contiguous(), receiver, group=self._group)
        elif self.rank == receiver:
            given = torch.zeros(shape)
            for piece in given.split(_PIECE_FRAMES, dim=-3):
                part = torch.zeros(piece.shape)
                distributed.recv(part, 0, group=self._group)
                piece.copy_(part)
            return given
        return None

    def _tell(self, told: Any) -> Any:
        """What the first rank tells all others: anything that JSON can say."""
        data = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
        length = torch.tensor(len(data))
        distributed.broadcast(length, src=0, group=self._group)
        if self.rank:
            data = torch.zeros(int(length), dtype=torch.uint8)
        distributed.broadcast(data, src=0, group=self._group)
        return json.loads(data.numpy().tobytes())


def as_told(error: BaseException) -> dict[str, str]:
    """An error in words for another rank."""
    return {"error": type(error).__name__, "message": str(error) or type(error).__name__}


def as_error(rank: int, told: dict[str, str]) -> LiveAvatarError:
    """What `as_told` said on another rank."""
    kind = getattr(errors, told["error"], LiveAvatarError)
    return kind(f"rank {rank}: {told['message']}")
