"""A callback that the first rank calls on another: the reference asks for live audio where frames are decoded."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import distributed

from ..conditions.speech import as_samples
from .ranks import Ranks, as_error, as_told

Callback = Callable[[], np.ndarray | None]
"""Returns the next samples, float32 or int16 mono at 16 kHz, any number, and None at the end."""
_CALL, _LEAVE, _SAMPLES, _END, _ERROR = range(5)


@contextmanager
def callback_of(ranks: Ranks, owner: int, callback: Callback | None) -> Iterator[Callback | None]:
    """The callback that rank `owner` has, for the first rank to call; None on others.

    While this is open, the owner runs it on a thread of its own, whenever it is called.
    """
    if owner == 0 or ranks.rank not in (0, owner):
        yield callback if ranks.rank == 0 else None
    elif ranks.rank == 0:
        remote = _Remote(ranks.calls, owner)
        try:
            yield remote
        finally:
            remote.close()
    else:
        assert callback is not None
        thread = threading.Thread(target=_serve, args=(ranks.calls, callback), name="liveavatar-callback", daemon=True)
        thread.start()
        try:
            yield None
        finally:
            if distributed.is_initialized():  # else nobody tells the thread to leave
                thread.join()


class _Remote:
    """Another rank's callback, called from one thread; any thread may close it."""

    def __init__(self, group: distributed.ProcessGroup, owner: int) -> None:
        self._group, self._owner = group, owner
        self._sending, self._open = threading.Lock(), True

    def __call__(self) -> np.ndarray | None:
        if not self._send(_CALL):
            return None
        kind, body = _receive(self._group, self._owner)
        if kind == _ERROR:
            raise as_error(self._owner, json.loads(body))
        return None if kind == _END else np.frombuffer(body, np.float32)

    def close(self) -> None:
        """Call no more."""
        self._send(_LEAVE)

    def _send(self, kind: int) -> bool:
        """Send if it is open; whether it was."""
        with self._sending:
            was_open = self._open and distributed.is_initialized()
            if was_open:
                self._open = kind != _LEAVE
                _send(self._group, self._owner, kind)
            return was_open


def _serve(group: distributed.ProcessGroup, callback: Callback) -> None:
    """Answer the first rank's calls until it leaves, or is gone."""
    with suppress(RuntimeError):  # gloo's, of a rank that is gone
        while _receive(group, 0)[0] == _CALL:
            _send(group, 0, *_answer(callback))


def _answer(callback: Callback) -> tuple[int, bytes]:
    try:
        samples = callback()
        if samples is None or not len(samples):
            return _END, b""
        return _SAMPLES, as_samples(samples).tobytes()
    except Exception as error:  # whatever the user's function raises: the first rank ends the stream with it
        return _ERROR, json.dumps(as_told(error)).encode()


def _send(group: distributed.ProcessGroup, rank: int, kind: int, body: bytes = b"") -> None:
    distributed.send(torch.tensor([kind, len(body)]), rank, group=group)
    if body:
        distributed.send(torch.frombuffer(bytearray(body), dtype=torch.uint8), rank, group=group)


def _receive(group: distributed.ProcessGroup, rank: int) -> tuple[int, bytes]:
    head = torch.zeros(2, dtype=torch.int64)
    distributed.recv(head, rank, group=group)
    kind, length = head.tolist()
    body = torch.zeros(length, dtype=torch.uint8)
    if length:
        distributed.recv(body, rank, group=group)
    return kind, body.numpy().tobytes()
