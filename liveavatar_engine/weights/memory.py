"""How much memory an engine needs, predicted from sizes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..conditions.audio_encoder import FEATURE_RATE, SAMPLES_PER_STATE
from ..conditions.audio_features import GLOBAL_SECONDS, window_samples
from ..config import EngineConfig, ModelConfig, StreamGeometry
from ..config.fit import TYPICAL_SIDES
from ..config.geometry import LATENT_FRAME_STRIDE, LATENT_STRIDE, MOTION_LATENTS, SPEECH_RATE
from ..config.size import Size
from ..denoise.caches import CacheArena
from ..errors import CheckpointError
from ..model.quantize import use_fp8
from ..pipeline.device import Precision, resolve_precision
from ..pipeline.offload import offloaded_parts
from ..runtime.graphs import PlainCalls
from ..vae.block_decoder import BlockDecoder
from ..vae.shape import VaeShape
from ..vae.vae import Vae
from .network import empty_network

_WIDE = torch.float32.itemsize
_LOGIT_TILE = 1 << 28
"""Bytes of attention logits that are computed at a time in plain PyTorch."""
_STEP_COPIES, _STEP_WIDENED = 9, 1.5
"""Copies of a block's tokens in the model's dtype that are alive at once in a step, and in float32 where that is wider,
measured with the ops in plain PyTorch."""
_EXCHANGE_COPIES = 4
"""More copies of a rank's tokens where several share a step, before and after an exchange; measured alike."""
_PAST_FRAMES = 2
"""Frames that a causal convolution of the VAE keeps."""
_DECODE_LAYERS, _ENCODE_LAYERS = 5, 11.3
"""Outputs of the VAE's widest layer that are alive at once, measured; the encoder's include its own history."""
_SPEECH_STRIDE = 5
"""Samples per output of the audio encoder's first convolution, whose output is its largest tensor."""
_FETCHED_LAYERS = 2
"""Layers of an offloaded text encoder that are on the device at once."""


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one kind, and what they depend on.

    Attributes:
        name: of the kind.
        bytes: on the device.
        note: what they depend on, or what they are.
        host: bytes in host memory, for parts that are offloaded.
    """

    name: str
    bytes: int
    note: str = ""
    host: int = 0


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory by what holds it.

    Weights, caches and static buffers are exact. Working memory is an estimate; CUDA's own context, the allocator's
    rounding and the workspaces of its libraries come on top.
    """

    rows: tuple[MemoryRow, ...]

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(row.bytes for row in self.rows)

    @property
    def host(self) -> int:
        """Bytes of offloaded weights in host memory."""
        return sum(row.host for row in self.rows)

    def __getitem__(self, name: str) -> int:
        """Bytes on the device of the row of that name."""
        return {row.name: row.bytes for row in self.rows}[name]

    def table(self) -> str:
        """The rows as plain text, a line each."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"  {row.name:<{width}}  {gigabytes(row.bytes):>9}  {row.note}".rstrip() for row in self.rows]
        return "\n".join([*lines, f"  {'total':<{width}}  {gigabytes(self.total):>9}"])


def gigabytes(count: int) -> str:
    """Bytes for a reader, such as "20.95 GB"; small ones in MB."""
    return f"{count / 1e9:.2f} GB" if count >= 10**8 else f"{count / 1e6:.2f} MB"


@dataclass(frozen=True)
class Share:
    """What one process of an engine on several devices holds.

    Attributes:
        encodes: conditions; so it has the encoders.
        denoises: some steps; so it has the network.
        decodes: so it has the decoder.
        steps: that it takes, each with a ring; counts where it denoises.
        mates: that share these steps.
        sessions: that it serves at once.
    """

    encodes: bool = False
    denoises: bool = False
    decodes: bool = False
    steps: int = 1
    mates: int = 1
    sessions: int = 1


Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape of the tensors in a file."""


@dataclass(frozen=True)
class PartSizes:
    """Sizes of the parts around the network; zero or None where a part is missing.

    Attributes:
        vae: of its tensors.
        text_parameters, text_layer: of the text encoder, and of each of its layers.
        text_heads, text_ffn: of its layers.
        audio_parameters: of the audio encoder.
        audio_channels: of its first convolution.
    """

    vae: VaeShape | None = None
    text_parameters: int = 0
    text_layer: int = 0
    text_heads: int = 0
    text_ffn: int = 0
    audio_parameters: int = 0
    audio_channels: int = 0

    @classmethod
    def of(cls, vae: Shapes, text: Shapes, audio: Shapes) -> PartSizes:
        """Read the sizes from the files' tensors."""
        try:
            vae_shape = VaeShape.of_tensors(vae)
        except CheckpointError:
            vae_shape = None
        count = {name: math.prod(shape) for name, shape in text.items()}
        first = (shape[0] for name, shape in audio.items() if name.endswith("conv_layers.0.conv.weight") and shape)
        return cls(
            vae=vae_shape,
            text_parameters=sum(count.values()),
            text_layer=sum(count[name] for name in count if name.startswith("blocks.0.")),
            text_heads=_last_axis(text, "blocks.0.pos_embedding.embedding.weight"),
            text_ffn=_last_axis(text, "blocks.0.ffn.fc2.weight"),
            audio_parameters=sum(math.prod(shape) for shape in audio.values()),
            audio_channels=next(first, 0),
        )


def _last_axis(shapes: Shapes, name: str) -> int:
    """Length of a tensor's last axis; 0 where there is none."""
    return (0, *shapes.get(name, ()))[-1]


def stream_geometry(model: ModelConfig, config: EngineConfig, size: Size | None = None) -> StreamGeometry:
    """The streams of an engine; an area is taken for a 16:9 picture.

    Raises:
        ConfigError, InputError: the size is not possible.
    """
    height, width = (size or config.parsed_size).sides(*TYPICAL_SIDES)
    return StreamGeometry(model, height, width, motion_tokens=config.motion_tokens)


def predict_memory(
    geometry: StreamGeometry,
    parts: PartSizes,
    config: EngineConfig,
    device: torch.device,
    share: Share | None = None,
) -> MemoryEstimate:
    """Predict the memory of an engine that has all of its sessions open.

    Args:
        geometry: network and picture size.
        parts: sizes of the parts around the network.
        config: precision, steps, sessions, offloading, graphs, schedule; of devices that share a step, one counts.
        device: its kind counts; it need not be there.
        share: of one of several processes; None: all is in one.

    Raises:
        ConfigError: precisions that do not go together, `fp8_skip` names no layer, or `sequence_parallel` cannot share
            the network's heads and tokens.
    """
    if share is None:
        every = Share(True, True, True)
        return MemoryEstimate(tuple(_Prediction(geometry, parts, config, device, every).rows()))
    own = replace(config, steps=share.steps, sequence_parallel=share.mates, max_sessions=share.sessions)
    return MemoryEstimate(tuple(_Prediction(geometry, parts, own, device, share).rows()))


class _Prediction:
    """The rows of an estimate."""

    def __init__(
        self, geometry: StreamGeometry, parts: PartSizes, config: EngineConfig, device: torch.device, share: Share
    ) -> None:
        self._share = share
        self._geometry, self._model, self._parts, self._config = geometry, geometry.model, parts, config
        self._precision: Precision = resolve_precision(config, device)
        self._item = self._precision.dtype.itemsize
        self._decoder_item = self._precision.decoder.itemsize
        self._offloaded = offloaded_parts(config, device)
        self._graphs = config.graphs and device.type == "cuda"
        self._plain_attention = device.type == "cpu"
        self._network = empty_network(geometry.model, self._precision.dtype)
        if self._precision.fp8_skip is not None:
            use_fp8(self._network, self._precision.fp8_skip)

    def rows(self) -> Iterator[MemoryRow]:
        yield from self._weights()
        yield from self._per_session()
        if self._share.denoises:
            yield from self._buffers()
        yield from self._working()

    def _weights(self) -> Iterator[MemoryRow]:
        if self._share.denoises:
            network = sum(parameter.nbytes for parameter in self._network.parameters())
            linear = "" if self._precision.fp8_skip is None else "linear layers in e4m3, "
            yield MemoryRow("network", network, f"{linear}some parameters in float32")
        if self._share.encodes:
            yield self._part("text encoder", "text_encoder", self._parts.text_parameters * self._item)
            yield MemoryRow("audio encoder", self._parts.audio_parameters * _WIDE, "float32")
        if self._parts.vae is not None and (self._share.encodes or self._share.decodes):
            size = _vae_bytes(self._parts.vae, self._precision.decoder)
            yield self._part("VAE", "vae", size, "the encoder is float32")

    def _part(self, name: str, part: str, size: int, note: str = "") -> MemoryRow:
        if part not in self._offloaded:
            return MemoryRow(name, size, note)
        return MemoryRow(name, 0, f"offloaded: {gigabytes(size)} of host memory", host=size)

    def _per_session(self) -> Iterator[MemoryRow]:
        if self._share.denoises:
            yield from self._caches()
        if self._share.encodes and self._config.features == "global":
            model, sessions = self._model, self._config.max_sessions
            states = sessions * GLOBAL_SECONDS * FEATURE_RATE * model.audio_layers * model.audio_dim * _WIDE
            yield MemoryRow("audio states", states, f"{_count(sessions, 'session')}, {GLOBAL_SECONDS} s each")
        if self._share.decodes and self._parts.vae is not None:
            yield self._decoder_row(self._parts.vae)

    def _decoder_row(self, vae: VaeShape) -> MemoryRow:
        sessions = self._config.max_sessions
        if "vae" in self._offloaded:
            history = sessions * _decoder_history(vae, self._pixels) * self._decoder_item
            return MemoryRow("VAE buffers", history, f"history of {_count(sessions, 'session')}")
        decoder = self._decoder(vae)
        size = decoder.bytes + (sessions - 1) * decoder.history_bytes
        return MemoryRow("VAE buffers", size, "of the decoder; other sessions: their history")

    def _caches(self) -> Iterator[MemoryRow]:
        config, geometry, model = self._config, self._geometry, self._model
        sessions, rings = config.max_sessions, 1 if config.kv_mode == "clean" else config.steps
        meta = torch.device("meta")
        arena = CacheArena(geometry, rings, sessions, self._precision.cache, self._precision.dtype, meta, self._ranks)
        ring, shared = gigabytes(arena.ring_bytes // (sessions * rings)), self._shared
        rings_of = f"{_count(sessions, 'session')} x {_count(rings, 'ring')} of {ring}"
        yield MemoryRow("rings", arena.ring_bytes, f"{rings_of}{shared}")
        yield MemoryRow("sinks", arena.sink_bytes, f"{_count(sessions, 'session')} x 2: one is read, one made{shared}")
        yield MemoryRow("text keys", arena.text_bytes, f"{_count(sessions, 'session')} x 2 x {model.text_len} tokens")

    def _buffers(self) -> Iterator[MemoryRow]:
        """What lies ready on the device for steps to read and write, for one actor."""
        config, geometry, model = self._config, self._geometry, self._model
        evaluations = config.steps + (config.kv_mode == "clean")
        modulation = (evaluations + 1) * (6 * model.num_layers + 2) * model.dim * _WIDE
        yield MemoryRow("time modulation", modulation, f"{_count(config.steps, 'step')} and the sink's")
        latents = math.prod(geometry.block_shape)
        frame = latents // geometry.frames_per_block
        wide = (2 * evaluations + 2) * latents + frame * (1 + MOTION_LATENTS * geometry.motion_tokens)
        wide += model.audio_layers * model.audio_dim * geometry.columns_per_block
        wide += geometry.sink_tokens * model.head_dim + geometry.tokens_per_frame * 4 * (model.head_dim // 6)  # angles
        audio = math.prod(self._network.audio_inputs_shape(1, geometry.frames_per_block))
        entered = self._together * (audio + geometry.tokens_per_block // self._ranks * model.dim)
        narrow = entered + 2 * -(-geometry.sink_tokens // self._ranks) * model.dim
        yield MemoryRow("static inputs", wide * _WIDE + narrow * self._item, "of steps: latents, audio, sink tokens")

    def _working(self) -> Iterator[MemoryRow]:
        """Denoising keeps its memory for good where its graphs are captured; all else takes turns."""
        share, window = self._share, window_samples(self._geometry.columns_per_block)
        speech = GLOBAL_SECONDS * SPEECH_RATE if self._config.features == "global" else window
        turns, vae = {}, self._parts.vae
        decoding, encoding = (0, 0) if vae is None else self._vae_working_bytes(vae)
        denoising = self._denoise_bytes() if share.denoises else 0
        if share.encodes:
            turns["encoding the audio"] = self._audio_bytes(speech)
            turns["encoding the prompt"] = self._text_bytes()
            turns["encoding the image"] = encoding
        captured = share.decodes and "vae" not in self._offloaded
        if share.decodes and not (self._graphs and captured):
            turns["decoding"] = decoding
        if self._graphs:
            kept = {
                "denoising": denoising,
                "windows of audio": self._audio_bytes(window) if share.encodes else 0,
                "decoding": decoding if captured else 0,
            }
            what = _list([name for name, size in kept.items() if size])
            yield MemoryRow("graphs", sum(kept.values()), f"estimate; working memory of {what}")
        elif share.denoises:
            turns["denoising"] = denoising
        if not turns:
            return
        largest = max(turns, key=lambda name: turns[name])
        yield MemoryRow("working memory", turns[largest], f"estimate; most for {largest}")

    @property
    def _pixels(self) -> int:
        return self._geometry.height * self._geometry.width

    @property
    def _ranks(self) -> int:
        """That share a step."""
        return self._config.sequence_parallel

    @property
    def _shared(self) -> str:
        """What a note says of caches of which each rank has a part."""
        return f"; 1/{self._ranks} of the heads" if self._ranks > 1 else ""

    @property
    def _together(self) -> int:
        """Blocks that take a step together."""
        return self._config.steps if self._config.schedule == "diagonal" else 1

    def _denoise_bytes(self) -> int:
        """Most that is alive in a step; self-attention in plain PyTorch comes on top.

        That makes float32 copies of all keys and values where they are narrower, and three tiles of logits.
        """
        model, block, item = self._model, self._geometry.tokens_per_block, self._item
        values = self._together * block // self._ranks * model.dim
        copies = _STEP_COPIES + (_EXCHANGE_COPIES if self._ranks > 1 else 0)
        alive = copies * values * item + (int(_STEP_WIDENED * values) * _WIDE if item < _WIDE else 0)
        if not self._plain_attention:
            return alive
        keys = self._geometry.ring_tokens + self._geometry.sink_tokens
        widened = 0 if item >= _WIDE else 2 * keys * model.dim // self._ranks * _WIDE
        logits = model.num_heads // self._ranks * block * keys * _WIDE
        return alive + widened + min(3 * _LOGIT_TILE, 2 * logits)

    def _vae_working_bytes(self, vae: VaeShape) -> tuple[int, int]:
        """Of decoding and of encoding; a part that is offloaded has come to the device by then."""
        layer = LATENT_FRAME_STRIDE * self._pixels * vae.widths[0]
        if "vae" not in self._offloaded:
            latents = self._geometry.frames_per_block
            return _DECODE_LAYERS * latents * layer * self._decoder_item, int(_ENCODE_LAYERS * layer) * _WIDE
        frames = 2 * self._geometry.columns_per_block * 3 * self._pixels * _WIDE
        encoder, decoder = _vae_halves(vae)
        decoding = (_DECODE_LAYERS * layer + decoder) * self._decoder_item + frames
        return decoding, int(_ENCODE_LAYERS * layer) * _WIDE + encoder * _WIDE

    def _decoder(self, shape: VaeShape) -> BlockDecoder:
        """The decoder's buffers, without storage."""
        with torch.device("meta"):
            vae = Vae(shape).requires_grad_(False)
        for part in (vae.decoder, vae.conv2):
            part.to(self._precision.decoder)
        _, latents, rows, columns = self._geometry.block_shape
        return BlockDecoder(vae, rows, columns, latents, PlainCalls())

    def _text_bytes(self) -> int:
        """Attention logits, also in float32, two rows of the FFN and the stream, and the layers that were fetched."""
        parts, tokens = self._parts, self._model.text_len
        rows = tokens * (parts.text_ffn + self._model.text_dim)
        fetched = _FETCHED_LAYERS * parts.text_layer if "text_encoder" in self._offloaded else 0
        return parts.text_heads * tokens**2 * (self._item + _WIDE) + (2 * rows + fetched) * self._item

    def _audio_bytes(self, samples: int) -> int:
        """Input and output of the first norm, and the states of all layers."""
        states = samples // SAMPLES_PER_STATE * self._model.audio_layers * self._model.audio_dim
        return (2 * self._parts.audio_channels * samples // _SPEECH_STRIDE + states) * _WIDE


def _list(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _vae_halves(shape: VaeShape) -> tuple[int, int]:
    """Parameters of encoder and decoder."""
    with torch.device("meta"):
        vae = Vae(shape)
    decoder = sum(p.numel() for part in (vae.decoder, vae.conv2) for p in part.parameters())
    return sum(p.numel() for p in vae.parameters()) - decoder, decoder


def _vae_bytes(shape: VaeShape, dtype: torch.dtype) -> int:
    encoder, decoder = _vae_halves(shape)
    return decoder * dtype.itemsize + encoder * _WIDE


def _decoder_history(shape: VaeShape, pixels: int) -> int:
    """Values that the decoder's causal convolutions keep: two frames of the input of each."""
    widths, in_time = shape.widths[::-1], shape.in_time[::-1]
    channels = widths[0]
    area = pixels // LATENT_STRIDE**2
    values = area * (shape.latent_channels + 4 * channels)
    for level, width in enumerate(widths):
        values += area * (channels + (2 * shape.blocks + 1) * width)
        channels = width
        if level < len(in_time):
            values += area * channels if in_time[level] else 0
            channels, area = channels // 2, 4 * area
    return _PAST_FRAMES * (values + area * channels)
