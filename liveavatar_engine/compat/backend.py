"""The engine behind a pipeline: loaded when it is first needed, with what has been asked of the noise model by then."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from typing import TYPE_CHECKING

import torch

from ..conditions.audio_features import ActorFeatures, Features, GlobalFeatures, WindowedFeatures, window_samples
from ..conditions.audio_window import AudioWindow
from ..conditions.speech import RecordedSpeech
from ..config import EngineConfig, StreamGeometry
from ..config.engine import REFERENCE_FP8_SKIP
from ..config.geometry import SPEECH_RATE
from ..errors import ConfigError
from ..pipeline.device import graphs_absent
from ..pipeline.one_device import OneDevice
from ..runtime.graphs import recorder
from ..weights.layout import Checkpoint
from .clips import ClipMaker
from .columns import WholeClips
from .devices import Layout
from .inputs import Inputs
from .noise_model import NoiseModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from ..pipeline.engine import Engine

_log = logging.getLogger(__name__)
_PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Backend:
    """Keeps one engine, and changes it as little as the next video needs.

    Args:
        found: the checkpoint.
        noise_model: what to load of its network.
        text_len: tokens of a prompt, at most; no more than the network reads.
    """

    def __init__(self, found: Checkpoint, noise_model: NoiseModel, text_len: int) -> None:
        if noise_model.param_dtype not in _PRECISIONS:
            raise ConfigError(f"param_dtype must be torch.bfloat16 or torch.float32, not {noise_model.param_dtype}")
        self._found, self._noise_model = found, noise_model
        self._text_len = min(text_len, noise_model.config.text_len)
        self._engine: Engine | None = None
        self._wanted: EngineConfig | None = None
        self._window: tuple[int, AudioWindow] | None = None
        self._clips: ClipMaker | None = None
        self._closing: weakref.finalize[..., Backend] | None = None

    @property
    def loaded(self) -> Engine | None:
        """The engine, if there is one yet."""
        return self._engine

    def settings(
        self, layout: Layout, steps: int, size: tuple[int, int], *, offload: bool, sink_distance: str | int
    ) -> EngineConfig:
        """The engine's settings for a video of (height, width), with weights as the noise model has them.

        Raises:
            ConfigError: a setting is out of range.
        """
        skip = self._noise_model.fp8_skip
        return EngineConfig(
            size=f"{size[1]}x{size[0]}",
            precision=_PRECISIONS[self._noise_model.param_dtype] if skip is None else "fp8",
            fp8_skip=REFERENCE_FP8_SKIP if skip is None else skip,
            devices=layout.devices,
            steps=steps,
            sink_distance=sink_distance,
            offload=("text_encoder",) if offload else (),
        )

    def engine(self, wanted: EngineConfig) -> Engine:
        """An engine with these settings; weights are loaded only if there is none that works with the same ones."""
        current = self._engine
        if current is None or current.failure is not None or not self._serves(current, wanted):
            self._load(wanted)
        elif current.config.steps != wanted.steps:
            self._clips = None
            self._keep(_with_steps(current, wanted.steps))
        self._wanted = wanted
        assert self._engine is not None
        return self._engine

    def context(self, engine: Engine, prompt: str) -> torch.Tensor:
        """The prompt's context, [tokens, text_dim]."""
        return engine.encoders.text.context(prompt, self._text_len)

    def spoken(self, engine: Engine, inputs: Inputs, whole_seconds: float) -> Features:
        """Audio states of recorded speech, to the end of its last clip.

        Up to `whole_seconds` are encoded as a whole, as the reference does with any length; longer speech in windows.
        """
        columns, encoder = inputs.geometry.columns_per_block, engine.encoders.audio
        actors: list[Features]
        if max(map(len, inputs.speech)) <= whole_seconds * SPEECH_RATE:
            actors = [GlobalFeatures(encoder, samples, columns) for samples in inputs.speech]
        else:
            _log.warning("audio longer than %g s: encoded in windows instead of as a whole", whole_seconds)
            window = self._audio_window(engine, columns)
            speech = [RecordedSpeech(iter([samples])) for samples in inputs.speech]
            actors = [WindowedFeatures(encoder, each, columns, window) for each in speech]
        return WholeClips(ActorFeatures(actors), inputs.geometry, inputs.clips)

    def heard(self, engine: Engine, inputs: Inputs, samples: Iterator[np.ndarray]) -> Features:
        """Audio states of samples that come one chunk after the other, [1, layers, dim, columns] a block."""
        columns = inputs.geometry.columns_per_block
        window = self._audio_window(engine, columns)
        return WindowedFeatures(engine.encoders.audio, RecordedSpeech(samples), columns, window)

    def clip_maker(self, engine: Engine, geometry: StreamGeometry) -> ClipMaker:
        """The single-GPU pipeline's buffers; kept for the geometry used last."""
        if self._clips is None or self._clips.geometry != geometry:
            self._clips = None
            self._clips = ClipMaker(engine, geometry)
        return self._clips

    def _audio_window(self, engine: Engine, columns: int) -> AudioWindow:
        if self._window is None or self._window[0] != columns:
            record_with = recorder(engine.device, engine.config.graphs and graphs_absent(engine.device) is None)
            window = AudioWindow(engine.encoders.audio, window_samples(columns), columns, record_with)
            self._window = columns, window
        return self._window[1]

    def _serves(self, engine: Engine, wanted: EngineConfig) -> bool:
        """Whether the weights as they are loaded serve these settings, too; their places depend on nothing else."""
        assert self._wanted is not None
        steps = wanted.steps if isinstance(engine.runner, OneDevice) else self._wanted.steps
        free = dataclasses.replace(self._wanted, size=wanted.size, steps=steps, sink_distance=wanted.sink_distance)
        return free == wanted

    def _load(self, wanted: EngineConfig) -> None:
        from ..pipeline.engine import Engine

        if self._closing is not None:
            self._closing()
        self._engine = self._window = self._clips = self._closing = None
        adapter = self._noise_model.adapter
        file, scale = (None, None) if adapter is None else (adapter.file, adapter.scale)
        engine = Engine.from_pretrained(self._found.root, file, wanted, lora_scale=scale, join_job=False)
        self._noise_model.settle()
        self._keep(engine)

    def _keep(self, engine: Engine) -> None:
        """Take an engine, which is closed, with its workers, when nobody needs this backend any more."""
        if self._closing is not None:
            self._closing.detach()
        self._engine, self._closing = engine, weakref.finalize(self, engine.close)


def _with_steps(engine: Engine, steps: int) -> Engine:
    """The same weights with another number of steps."""
    from ..pipeline.engine import Engine

    assert isinstance(engine.runner, OneDevice)
    config = dataclasses.replace(engine.config, steps=steps)
    return Engine(config, OneDevice(config, engine.runner.network, engine.encoders.vae), engine.encoders)
