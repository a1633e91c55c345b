"""What a user can choose when opening an engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .size import Size

PRECISIONS = ("fp32", "bf16", "fp8")
VAE_PRECISIONS = ("fp32", "bf16", "fp16")
SINK_DISTANCES = (4, 30)
"""Range, both ends included, from which the reference draws the sink distance."""
DEFAULT_SEED = 420
REFERENCE_FP8_SKIP = (
    "text_embedding",
    "time_embedding",
    "time_projection",
    "head.head",
    "casual_audio_encoder.encoder.final_linear",
)
"""Parts of the names of linear layers that the reference keeps out of FP8."""
OFFLOADABLE = ("text_encoder", "vae")
"""Parts whose weights can stay in host memory."""
DESIGN_STAGE_MS = (110.0, 60.0)
"""A step and a block's decoding on an H200, as the design's budget wants them."""


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine; frozen. Every unknown or contradictory value is one ConfigError at construction.

    Attributes:
        size: "W*H", an area that keeps the image's aspect ratio with sides that are multiples of 64, or "WxH", exact
            sides that are multiples of 16.
        precision: "fp32", "bf16", "fp8" (linear layers in e4m3, all else as in bf16) or "auto" (bf16 on a GPU, fp32 on
            a CPU).
        kv_precision: of ring and sink: "fp8" with any precision; "auto" is fp32 with fp32, else bf16.
        vae_precision: of the VAE's decoder: "fp32", "bf16", "fp16", or "auto", which is fp32 with fp32, else bf16. fp16
            is closer to fp32 by about 18 dB (docs/log.md), but has not been tried with published weights.
        fp8_skip: parts of the names of linear layers that stay out of e4m3 with precision "fp8"; by default the
            reference's list. `liveavatar-engine inspect --precision` shows what each layer loses.
        devices: "auto" (the first GPU, else the CPU), a device name such as "cpu" or "cuda:0", or a list of them.
        steps: denoise steps per block, each with a ring of its own.
        sink_distance: temporal distance from a block to the reference image's keys, in latent frames: "random" draws
            it from 4..30 for every step from the session's seed, as the reference does.
        sink_update_after: blocks after which the first generated latent replaces the reference image in the sink
            (4: the reference's code; 1: the paper's Algorithms 3 and 4); None keeps the image.
        motion_tokens: keep the packed motion latents in the sink (False: the paper's section 5.1).
        features: "global" encodes a whole utterance of up to 60 s at once, as the reference does; "windowed" encodes
            block by block with a fixed context, as live and longer audio always do.
        graphs: replay captured CUDA graphs where the device has them; off on a CPU.
        schedule: "sequential" takes a block through all steps before the next one starts; "diagonal" takes one step
            with each of `steps` blocks at once: the same latents with larger products, each block `steps` times later.
        kv_mode: "timestep": each step attends to keys of its own noise level, in a ring of its own; "clean": all steps
            share one ring, whose keys and values come from one more evaluation of the finished latents.
        sequence_parallel: devices that share each denoise step, to shorten the wait for the first frame; must divide
            the network's heads and the tokens of a latent frame.
        max_sessions: sessions that can be open at the same time.
        frames: "host": chunks hold numpy arrays; "device": tensors on the engine's device, which other libraries can
            take over without a copy (DLPack).
        early_first_frame: deliver the first latent's frames as a chunk of their own, before the rest of the first block
            is decoded.
        offload: parts whose weights stay in host memory and visit the GPU only while they are used: "text_encoder",
            layer by layer, when a session opens; "vae", for every block. The results are the same. On a CPU it means
            nothing.
        stage_ms: milliseconds that one denoise step and the decoding of a block take on one of several devices, by
            which work is spread over them; by default the design's targets, whose ratio is what counts. `bench step`
            and `bench vae` measure them.
    """

    size: str = "704*384"
    precision: str = "auto"
    kv_precision: str = "auto"
    vae_precision: str = "auto"
    fp8_skip: tuple[str, ...] = REFERENCE_FP8_SKIP
    devices: str | tuple[str, ...] = "auto"
    steps: int = 4
    sink_distance: str | int = "random"
    sink_update_after: int | None = 4
    motion_tokens: bool = True
    features: str = "global"
    graphs: bool = True
    schedule: str = "sequential"
    kv_mode: str = "timestep"
    sequence_parallel: int = 1
    max_sessions: int = 1
    frames: str = "host"
    early_first_frame: bool = False
    offload: tuple[str, ...] = ("text_encoder",)
    stage_ms: tuple[float, float] = DESIGN_STAGE_MS

    def __post_init__(self) -> None:
        Size.parse(self.size)
        self._check_choice("precision", ("auto", *PRECISIONS))
        self._check_choice("kv_precision", ("auto", *PRECISIONS))
        self._check_choice("vae_precision", ("auto", *VAE_PRECISIONS))
        self._check_choice("features", ("global", "windowed"))
        self._check_choice("schedule", ("sequential", "diagonal"))
        self._check_choice("kv_mode", ("timestep", "clean"))
        self._check_choice("frames", ("host", "device"))
        self._check_count("steps", 1, 1000)
        self._check_count("max_sessions", 1, 1024)
        self._check_count("sequence_parallel", 1, 64)
        for name in ("motion_tokens", "graphs", "early_first_frame"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.sink_distance != "random":
            self._check_count("sink_distance", *SINK_DISTANCES, other="'random'")
        if self.sink_update_after is not None:
            self._check_count("sink_update_after", 1, None, other="None")
        if "fp8" != self.kv_precision != "auto" and self.precision != "auto":
            kept = "fp32" if self.precision == "fp32" else "bf16"
            if self.kv_precision != kept:
                raise ConfigError(
                    f"kv_precision with precision {self.precision} must be auto, {kept} or fp8, "
                    f"not {self.kv_precision!r}"
                )
        object.__setattr__(self, "fp8_skip", _names("fp8_skip", self.fp8_skip))
        object.__setattr__(self, "devices", _device_names(self.devices))
        object.__setattr__(self, "offload", _names("offload", self.offload))
        object.__setattr__(self, "stage_ms", _costs(self.stage_ms))
        if set(self.offload) - set(OFFLOADABLE) or len(set(self.offload)) < len(self.offload):
            raise ConfigError(f"offload: expected some of {', '.join(OFFLOADABLE)}, not {', '.join(self.offload)}")
        self._check_schedule()
        if not isinstance(self.devices, str) and len(self.devices) > 1:
            self.check_for_several_devices()

    @property
    def parsed_size(self) -> Size:
        return Size.parse(self.size)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """Build from a dictionary, for instance one read from JSON; an unknown key is a ConfigError."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**settings)

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")

    def _check_count(self, name: str, low: int, high: int | None, other: str | None = None) -> None:
        value = getattr(self, name)
        valid = (
            isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
        )
        if not valid:
            span = f"at least {low}" if high is None else f"{low} to {high}"
            raise ConfigError(f"{name} must be {other + ' or ' if other else ''}an integer, {span}, not {value!r}")

    def _check_schedule(self) -> None:
        if self.schedule != "diagonal":
            return
        if self.kv_mode == "clean":
            raise ConfigError(
                "schedule 'diagonal' needs kv_mode 'timestep': with 'clean' each block needs the last one"
            )
        if self.max_sessions > 1:
            raise ConfigError(
                f"schedule 'diagonal' serves one session: max_sessions must be 1, not {self.max_sessions}"
            )

    def check_for_several_devices(self) -> None:
        """Check that nothing asked for needs all steps on one device.

        Raises:
            ConfigError: something does.
        """
        for name, needed in (("schedule", "sequential"), ("kv_mode", "timestep"), ("frames", "host")):
            if getattr(self, name) != needed:
                raise ConfigError(f"several devices need {name} {needed!r}, not {getattr(self, name)!r}")


def _names(setting: str, names: Any) -> tuple[str, ...]:
    """A list of names as a tuple."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{setting} must be a list of names, not {names!r}")
    return tuple(names)


def _costs(costs: Any) -> tuple[float, float]:
    """Two times as floats."""
    valid = isinstance(costs, list | tuple) and len(costs) == 2
    if not valid or not all(isinstance(c, int | float) and 0 < c < math.inf for c in costs):
        raise ConfigError(f"stage_ms must be two times in ms, of a step and of decoding a block, not {costs!r}")
    return float(costs[0]), float(costs[1])


def _device_names(devices: Any) -> str | tuple[str, ...]:
    """`devices` as "auto" or a tuple of device names."""
    names = devices if not isinstance(devices, str) else (devices,)
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"devices must be 'auto', a device name or a list of names, not {devices!r}")
    if "auto" in names:
        if len(names) > 1:
            raise ConfigError(f"devices: 'auto' stands alone, not beside others in {devices!r}")
        return "auto"
    if len(set(names)) < len(names):
        raise ConfigError(f"devices {devices!r}: a device is named twice")
    return tuple(names)
