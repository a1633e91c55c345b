"""Audio states of a block from a window of fixed length: recorded once, replayed for every block of every session."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from ..runtime.graphs import Recorder
from ..runtime.struct import DeviceStruct
from .audio_encoder import FEATURE_RATE, STATE_RATE, AudioEncoder, feature_index


def lerp_columns(states: Tensor, before: Tensor, after: Tensor, part: Tensor) -> Tensor:
    """States between moments: [layers, moments, dim] at [columns] each -> [layers, dim, columns]."""
    mixed = torch.lerp(states.index_select(1, before), states.index_select(1, after), part[:, None])
    return mixed.transpose(1, 2)


def column_moments(first: int, count: int, first_moment: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For `count` columns from `first` on: the states before and after each, as indices 0..last, and how far it is.

    A column's exact time is that of its 30 Hz feature; states come at 50 Hz, the first of them at `first_moment`.
    """
    features = np.array([feature_index(first + column) for column in range(count)], dtype=np.int64)
    moments, parts = np.divmod(features * STATE_RATE, FEATURE_RATE)
    before, after = (np.minimum(moments + offset - first_moment, last) for offset in (0, 1))
    return before, after, (parts / FEATURE_RATE).astype(np.float32)


class AudioWindow:
    """The encoder over `samples` samples, and the columns of one block of it. Sessions take turns.

    Args:
        encoder: what turns speech into states.
        samples: length of the window.
        columns: per block.
        recorder: records the work, as soon as this is made.
    """

    def __init__(self, encoder: AudioEncoder, samples: int, columns: int, recorder: Recorder) -> None:
        self.samples, self._encoder, self._recorder = samples, encoder, recorder
        self._lock = threading.Lock()
        self._struct = DeviceStruct(
            {
                "speech": ((samples,), torch.float32),
                "before": ((columns,), torch.int64),
                "after": ((columns,), torch.int64),
                "part": ((columns,), torch.float32),
            },
            encoder.device,
        )
        self._columns = torch.zeros(encoder.state_count, encoder.state_dim, columns, device=encoder.device)
        with torch.inference_mode(), recorder.stream():
            self._replay = recorder.record(self._work)

    def columns(self, speech: np.ndarray, moments: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Tensor:
        """A block's columns of `samples` float32 samples: [state_count, state_dim, columns]; see `column_moments`."""
        with self._lock, torch.inference_mode(), self._recorder.stream():
            host = self._struct.host()
            host["speech"].copy_(torch.from_numpy(self._encoder.normalized(speech)))
            for name, values in zip(("before", "after", "part"), moments, strict=True):
                host[name].copy_(torch.from_numpy(values))
            self._struct.send()
            self._replay()
            return self._recorder.hand_out(self._columns.clone())

    def _work(self) -> None:
        states = self._encoder.encode(self._struct["speech"])
        moments = (self._struct[name] for name in ("before", "after", "part"))
        self._columns.copy_(lerp_columns(states, *moments))
