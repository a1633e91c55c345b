"""The reference's model class over this engine's network, for those who call it in a loop of their own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from liveavatar_kernels.cache import FIXED, MOVED, KeyValueCache
from torch import Tensor

from ..config import ModelConfig, StreamGeometry
from ..config.engine import SINK_DISTANCES
from ..config.geometry import LATENT_STRIDE, MOTION_BUCKETS, MOTION_LATENTS
from ..denoise.caches import CacheLayout
from ..denoise.positions import Place, Scene, SinkPositions, StepPositions
from ..errors import ConfigError, InputError
from ..model import Network
from ..model.attention import KeyValue, LayerCaches
from ..model.audio_injection import AudioInputs, frame_view
from ..model.network import MOTION_FRAMES, StepInputs, TimeModulation
from ..model.residual import Residual
from ..weights.network import load_network
from .inputs import check_mask

LayerDict = dict[str, Tensor]
"""Of one layer: "k" and "v" [1, ring tokens, heads, head_dim], "cond_k" and "cond_v" [1, at least the sink's tokens,
heads, head_dim], "cond_end" an integer tensor [1]."""


class CausalWanModel_S2V(Network):
    """The network with the reference's state-dict names and forward signature.

    Results are the reference's; what the dictionaries of `kv_cache` hold is this engine's: keys of the sink lie rotated
    in "cond_k", motion before the reference image. They can be moved and copied, but not shared with the reference.

    Attributes:
        sink_distance: "random", drawn as the reference draws it, from Python's `random` in every call; or a fixed
            distance from the block to the reference image, in latent frames.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.sink_distance: str | int = "random"
        self._places: tuple[StreamGeometry, torch.device, StepPositions, SinkPositions] | None = None

    @classmethod
    def from_pretrained(
        cls,
        checkpoint_dir: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        device_map: str | torch.device = "cpu",
        lora: str | Path | None = None,
    ) -> Self:
        """Load a checkpoint's network, and merge an adapter.

        Raises:
            CheckpointError: files are missing or damaged, or tensors do not fit.
        """
        adapter = None if lora is None else Path(lora)
        loaded = load_network(Path(checkpoint_dir), adapter, torch_dtype, torch.device(device_map))
        with torch.device("meta"):
            model = cls(loaded.config)
        model.load_state_dict(loaded.state_dict(), assign=True)
        return model.eval().requires_grad_(False)

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:  # type: ignore[override]
        """The reference's dispatch: fill the sink with `sink_flag`, else the velocity of a block; both need `kv_cache`.

        Raises:
            ConfigError: there is no `kv_cache`: the reference trains then.
            InputError: an input does not fit.
        """
        if kwargs.get("kv_cache") is None:
            raise ConfigError("kv_cache: expected a list of dictionaries, one per layer; this class does not train")
        if kwargs.pop("sink_flag", False):
            return self._forward_sink(*args, **kwargs)
        return self._forward_inference(*args, **kwargs)

    def _forward_sink(
        self,
        x: list[Tensor],
        t: Tensor,
        context: Sequence[Tensor],
        seq_len: int | None,
        ref_latents: Tensor | Sequence[Tensor],
        motion_latents: Tensor | Sequence[Tensor],
        cond_states: Tensor,
        audio_input: Tensor | None = None,
        motion_frames: Sequence[int] = (17, 5),
        add_last_motion: int = 2,
        drop_motion_frames: bool = False,
        kv_cache: Sequence[LayerDict] | None = None,
        crossattn_cache: object = None,
        current_start: int = 0,
        current_end: int = 0,
        sequence_current_start: int = 0,
    ) -> list[Tensor]:
        """Fill the sink of `kv_cache` with the reference image and motion, at time 0 and base positions.

        Only the size of `x` counts; `t`, `seq_len`, `audio_input`, `motion_frames`, `crossattn_cache`, `current_end` do
        not. Returns zeros like `cond_states`.
        """
        if drop_motion_frames or sequence_current_start:
            raise InputError("drop_motion_frames and sequence_current_start: only False and 0 are supported")
        if current_start:
            raise InputError(f"current_start {current_start}: the sink is filled at its base positions, with 0")
        assert kv_cache is not None
        geometry = self._geometry(x, kv_cache)
        _, sink = self._positions(geometry)
        caches = self._caches(geometry, kv_cache, _only(context, "context"))
        motion = _without_newest(_only(motion_latents, "motion_latents"), add_last_motion)
        sink.write(self._scene(context[0]))
        view, time = sink.view(), self.time_modulation((0.0,))
        stream = Residual(self.sink_tokens(_only(ref_latents, "ref_latents").to(self.dtype), motion))
        for block, modulation, layer in zip(self.layers(), time.blocks, caches, strict=True):
            stream = block(stream, modulation, LayerCaches(layer.sink, layer.sink, layer.text), view)
        for layer_dict in kv_cache:
            layer_dict["cond_end"].fill_(geometry.sink_tokens)
        return list(torch.zeros_like(cond_states))

    def _forward_inference(
        self,
        x: list[Tensor],
        t: Tensor,
        context: Sequence[Tensor],
        seq_len: int | None,
        ref_latents: object,
        motion_latents: object,
        cond_states: Tensor | Sequence[Tensor],
        audio_input: Tensor | None = None,
        motion_frames: Sequence[int] = (17, 5),
        add_last_motion: int = 2,
        drop_motion_frames: bool = False,
        kv_cache: Sequence[LayerDict] | None = None,
        crossattn_cache: object = None,
        current_start: int = 0,
        current_end: int = 0,
        sequence_current_start: int = 0,
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """The velocity of a block, whose keys and values are written to the ring of `kv_cache`.

        What belongs to the sink (`ref_latents`, `motion_latents`, `add_last_motion`, ...) does not count, as in the
        reference, nor do `seq_len`, `crossattn_cache` and `current_end`.

        Args:
            x: one tensor [channels, frames, latent_height, latent_width].
            t: [1, frames], a timestep per frame.
            context: one prompt's context [tokens, text_dim].
            cond_states: pose latents [1, cond_dim, frames, latent_height, latent_width].
            audio_input: wav2vec2 states [actors, audio_layers, audio_dim, 4 * frames].
            motion_frames: (73, 19), the audio encoder's context.
            kv_cache: a dictionary per layer.
            current_start: first token of the block since the start of the stream.
            mask: [actors, frames, rows, columns, 1] on the token grid; needed for several actors.

        Returns:
            One tensor like that of `x`, in its dtype.
        """
        if audio_input is None:
            raise InputError("audio_input: expected wav2vec2 states, not None")
        if tuple(motion_frames) != (MOTION_FRAMES, MOTION_LATENTS):
            raise InputError(f"motion_frames: expected [{MOTION_FRAMES}, {MOTION_LATENTS}], not {list(motion_frames)}")
        assert kv_cache is not None
        geometry = self._geometry(x, kv_cache)
        block, within = divmod(current_start, geometry.tokens_per_block)
        if within or current_start < 0:
            raise InputError(
                f"current_start {current_start}: expected the start of a block of {geometry.tokens_per_block} tokens"
            )
        steps, _ = self._positions(geometry)
        frame = block * geometry.frames_per_block
        steps.write([Place(0, block, frame, self._distance(), self._scene(_only(context, "context")))])
        view = steps.view(slice(0, 1))
        view.rings[0].window.segments[:, FIXED : MOVED + 1, 1] *= (kv_cache[0]["cond_end"] > 0).to(torch.int32)
        velocity = super().forward(
            _only(x, "x"),
            self._time(t, geometry.frames_per_block),
            self._inputs(geometry, cond_states, audio_input, mask),
            self._caches(geometry, kv_cache, context[0]),
            view,
        )
        return [velocity.to(x[0].dtype)]

    def _time(self, t: Tensor, frames: int) -> TimeModulation:
        """Of a timestep per frame, or one for all; stays on the device."""
        if t.numel() not in (1, frames):
            raise InputError(f"t: expected [1, {frames}], not {list(t.shape)}")
        return self.time_modulation(t.flatten().unbind())  # type: ignore[arg-type]

    def _inputs(
        self, geometry: StreamGeometry, cond_states: Tensor | Sequence[Tensor], audio: Tensor, mask: Tensor | None
    ) -> StepInputs:
        model, actors = self.config, len(audio)
        wanted = (actors, model.audio_layers, model.audio_dim, geometry.columns_per_block)
        if tuple(audio.shape) != wanted:
            raise InputError(f"audio_input: expected {list(wanted)}, not {list(audio.shape)}")
        if mask is None and actors > 1:
            raise InputError(f"audio_input of {actors} actors: expected a mask")
        weights = None
        if mask is not None:
            shape = (actors, geometry.frames_per_block, geometry.tokens_per_frame, 1)
            weights = check_mask(mask, geometry, actors).to(self.device, self.dtype).expand(shape)
        view = frame_view(geometry.frames_per_block, model.num_audio_token + 1).to(self.device)
        bias = self.token_bias(_only(cond_states, "cond_states"))
        return StepInputs(bias, AudioInputs(self.audio_inputs(audio), view), weights)

    def _geometry(self, x: Sequence[Tensor], kv_cache: Sequence[LayerDict]) -> StreamGeometry:
        """Of the latents and caches given; checks that they fit the network and each other."""
        latents = _only(x, "x")
        if latents.ndim != 4 or latents.shape[0] != self.config.in_dim:
            raise InputError(f"x: expected [{self.config.in_dim}, frames, height, width], not {list(latents.shape)}")
        if len(kv_cache) != self.config.num_layers:
            raise InputError(f"kv_cache: expected {self.config.num_layers} dictionaries, not {len(kv_cache)}")
        _, frames, height, width = latents.shape
        sides = height * LATENT_STRIDE, width * LATENT_STRIDE
        tokens = StreamGeometry(self.config, *sides, frames, frames).tokens_per_frame
        ring = kv_cache[0]["k"].shape[1]
        if ring % (tokens * frames):
            raise InputError(f"kv_cache: {ring} tokens hold no whole blocks of {frames} x {tokens}")
        geometry = StreamGeometry(self.config, *sides, frames, ring // tokens)
        room = kv_cache[0]["cond_k"].shape[1]
        if room < geometry.sink_tokens:
            raise InputError(f"kv_cache: cond_k has room for {room} tokens, the sink has {geometry.sink_tokens}")
        return geometry

    def _positions(self, geometry: StreamGeometry) -> tuple[StepPositions, SinkPositions]:
        """Kept for the geometry used last."""
        device, layout = self.device, CacheLayout.of(geometry, quantized=False)
        if self._places is None or self._places[:2] != (geometry, device):
            steps = StepPositions(geometry, layout, 1, device, torch.float32, noise=False)
            self._places = geometry, device, steps, SinkPositions(geometry, layout, device, torch.float32)
        return self._places[2:]

    def _caches(self, geometry: StreamGeometry, kv_cache: Sequence[LayerDict], context: Tensor) -> list[LayerCaches]:
        """The dictionaries' tensors as the network's caches, and the prompt's keys and values."""
        return [
            LayerCaches(
                KeyValueCache(layer["k"], layer["v"], run_tokens=geometry.tokens_per_block),
                KeyValueCache(layer["cond_k"], layer["cond_v"]),
                KeyValue(text.k[None], text.v[None]),
            )
            for layer, text in zip(kv_cache, self.text_keys(context), strict=True)
        ]

    def _scene(self, context: Tensor) -> Scene:
        if context.ndim != 2 or len(context) > self.config.text_len or context.shape[1] != self.config.text_dim:
            expected = f"[at most {self.config.text_len}, {self.config.text_dim}]"
            raise InputError(f"context: expected {expected}, not {list(context.shape)}")
        return Scene(0, 0, len(context), self.config.text_len - len(context))

    def _distance(self) -> int:
        return random.randint(*SINK_DISTANCES) if self.sink_distance == "random" else int(self.sink_distance)


def _only(values: Sequence[Tensor] | Tensor, name: str) -> Tensor:
    """The one entry of a batch."""
    if len(values) != 1:
        raise InputError(f"{name}: expected a batch of one, not of {len(values)}: call once per stream")
    return values[0]


def _without_newest(motion: Tensor, add_last_motion: int) -> Tensor:
    """Motion latents without the newest 0, 1 or 3, which are zero with `add_last_motion` 2, 1 and 0."""
    if add_last_motion not in (0, 1, 2):
        raise InputError(f"add_last_motion: expected 0, 1 or 2, not {add_last_motion!r}")
    left_out = sum(bucket.latents for bucket in MOTION_BUCKETS[: 2 - add_last_motion])
    if not left_out:
        return motion
    kept = motion.clone()
    kept[:, -left_out:] = 0
    return kept
