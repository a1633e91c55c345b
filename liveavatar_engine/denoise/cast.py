"""What blocks bring besides noise, audio above all, in static buffers for a number of actors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import StreamGeometry
from ..errors import InputError
from ..model import Network
from ..model.audio_injection import AudioInputs, frame_view
from ..model.network import StepInputs
from ..model.sequence import TokenSplit
from ..runtime.graphs import Recorder, Work


class Cast:
    """Inputs of blocks with `actors` actors, and the recorded work that reads them.

    Where several blocks take a step together, the inputs of each lie in the row of its step, and move along with it.
    What belongs to tokens is kept of this rank's only.

    Attributes:
        actors: whose audio a block brings.
        steps: work by first and last step.
    """

    def __init__(
        self, network: Network, geometry: StreamGeometry, actors: int, masked: bool, rows: int, split: TokenSplit
    ) -> None:
        model, frames, device = network.config, geometry.frames_per_block, network.device

        def zeros(*shape: int, dtype: torch.dtype = network.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.actors, self._network, self._frames, self._split = actors, network, frames, split
        self._states = zeros(
            actors, model.audio_layers, model.audio_dim, geometry.columns_per_block, dtype=torch.float32
        )
        self._audio = zeros(rows, *network.audio_inputs_shape(actors, frames))
        self._token_bias = zeros(rows, split.count(geometry.tokens_per_block), model.dim)
        self._mask = zeros(actors, frames, split.count(geometry.tokens_per_frame), 1) if masked else None
        self._posed = True
        self._prepare: Work = self._prepare_audio
        self.steps: dict[tuple[int, int], Work] = {}

    def record(
        self, recorder: Recorder, ranges: Sequence[tuple[int, int]], work: Callable[[Cast, int, int], Work]
    ) -> None:
        """Record what prepares a block's audio, and the work of each range of steps."""
        self._prepare = recorder.record(self._prepare_audio)
        for first, last in ranges:
            self.steps[first, last] = recorder.record(work(self, first, last))

    def enter(self, states: Tensor, pose: Tensor | None, mask: Tensor | None) -> None:
        """Take a new block's inputs, computed once for all of its steps.

        Args:
            states: wav2vec2 states [actors, audio_layers, audio_dim, columns_per_block].
            pose: pose latents [cond_dim, frames, latent_height, latent_width] or None.
            mask: [actors, frames or 1, tokens_per_frame, 1]; None where there is none.

        Raises:
            InputError: states of another shape.
        """
        if states.shape != self._states.shape:
            raise InputError(f"audio states: expected {list(self._states.shape)}, not {list(states.shape)}")
        self._states.copy_(states)
        self._prepare()
        if pose is not None or self._posed:
            bias = self._network.token_bias(pose)
            self._token_bias[0].copy_(bias if pose is None else self._split.mine(bias))
            self._posed = pose is not None
        if self._mask is not None and mask is not None:
            self._mask.copy_(self._split.mine(mask, dim=2))

    def inputs(self, steps: slice) -> Callable[[], StepInputs]:
        """Makes the inputs of some steps' blocks, side by side."""
        rows = steps if len(self._audio) > 1 else slice(0, 1)
        count = rows.stop - rows.start
        view = frame_view(count * self._frames, self._network.config.num_audio_token + 1).to(self._audio.device)

        def make() -> StepInputs:
            audio = AudioInputs(side_by_side(self._audio[rows], 2), view)
            mask = None if self._mask is None else self._mask.repeat(1, count, 1, 1)
            return StepInputs(self._token_bias[rows].flatten(0, 1), audio, mask)

        return make

    def pass_on(self, steps: slice) -> None:
        """Move inputs to the row of the next step."""
        if len(self._audio) == 1:
            return
        last = min(steps.stop, len(self._audio) - 1)
        for rows in (self._audio, self._token_bias):
            rows[steps.start + 1 : last + 1].copy_(rows[steps.start : last].clone())

    def _prepare_audio(self) -> None:
        self._audio[0].copy_(self._network.audio_inputs(self._states))


def side_by_side(rows: Tensor, dim: int) -> Tensor:
    """[count, ...] -> the entries joined along `dim` of what remains."""
    return rows[0] if len(rows) == 1 else torch.cat(tuple(rows), dim=dim)
