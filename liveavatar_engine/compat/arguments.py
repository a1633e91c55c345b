"""The arguments of the reference's `generate`: names, order, defaults, and what each asks for."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..config.geometry import LATENT_FRAME_STRIDE
from ..denoise.schedule import SHIFT
from ..errors import ConfigError, InputError

_log = logging.getLogger(__name__)
_SOLVER = "euler"
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Arguments:
    """What `generate` of the single-GPU pipeline takes; others change defaults.

    Some names the reference takes and never reads. Asking for what they promise is an error here; a value that every
    script passes anyway is named in the log.

    Attributes:
        input_prompt: what the scene shows.
        ref_image_path: the portrait's file.
        audio_path: the speech's file; of several actors, joined by "+".
        enable_tts, tts_prompt_audio, tts_prompt_text, tts_text: speech synthesis, which is refused.
        num_repeat: clips at most, None: as many as the audio lasts. (Block-wise: nothing.)
        pose_video: a file whose frames steer the pose.
        generate_size: not read; `max_area` is what counts.
        max_area: pixels of a frame, at most; the portrait's aspect ratio is kept.
        infer_frames: video frames of a clip; as many latents as a ring holds.
        shift: not read: the schedule's is 3.
        sample_solver: "euler", the only one that the reference has.
        sampling_steps: denoise steps per block.
        guide_scale, n_prompt: not read: there is no guidance.
        seed: of noise and sink distances; negative: any. Above 2 ** 62, of which scripts draw
            some, 2 ** 62 + 1 is taken off.
        offload_model: keep the text encoder's weights in host memory.
        init_first_frame, use_dataset, dataset_sample_idx, drop_motion_noisy: not read in the reference; refused.
        num_gpus_dit, enable_vae_parallel: GPUs that denoise, and whether one more decodes.
        max_repeat: clips at most.
        mask: where each actor is, [actors, frames or 1, rows, columns, 1] on the token grid: weights of what its audio
            moves. None: SAM2's masks, where there are several actors.
        input_video_for_sam2: a file whose masks SAM2 has made or is to make, in place of the portrait.
        enable_online_decode: renew the sink's reference and motion latents after the first clip (single GPU).
    """

    input_prompt: str | None = None
    ref_image_path: str | Path | None = None
    audio_path: str | None = None
    enable_tts: bool = False
    tts_prompt_audio: str | None = None
    tts_prompt_text: str | None = None
    tts_text: str | None = None
    num_repeat: int | None = 1
    pose_video: str | Path | None = None
    generate_size: Any = None
    max_area: int = 720 * 1280
    infer_frames: int = 80
    shift: float = 5.0
    sample_solver: str = "unipc"
    sampling_steps: int = 40
    guide_scale: float | tuple[float, ...] = 5.0
    n_prompt: str = ""
    seed: int = -1
    offload_model: bool = True
    init_first_frame: bool = False
    use_dataset: bool = False
    dataset_sample_idx: int = 0
    drop_motion_noisy: bool = False
    num_gpus_dit: int = 1
    max_repeat: int = 1_000_000
    enable_vae_parallel: bool = False
    mask: Tensor | None = None
    input_video_for_sam2: str | Path | None = None
    enable_online_decode: bool = False

    def check(self, frames_per_block: int) -> None:
        """Check everything that needs no file.

        Raises:
            InputError: an input is missing.
            ConfigError: a setting is out of range, or asks for what neither the reference nor this backend does.
        """
        self._check_inputs()
        for name in ("init_first_frame", "use_dataset", "drop_motion_noisy"):
            if getattr(self, name):
                raise ConfigError(f"{name}=True: the reference takes it and does nothing with it; leave it out")
        if self.dataset_sample_idx:
            raise ConfigError(
                "dataset_sample_idx: only for use_dataset, which the reference does not read; leave it out"
            )
        if self.sample_solver != _SOLVER:
            raise ConfigError(f"sample_solver {self.sample_solver!r}: the reference only runs {_SOLVER!r}; pass that")
        _check_counts(self, ("sampling_steps", "max_area", "max_repeat", "num_gpus_dit"))
        if self.num_repeat is not None:
            _check_counts(self, ("num_repeat",))
        self._check_clip(frames_per_block)
        self._tell_what_counts_for_nothing()

    def _check_inputs(self) -> None:
        if self.enable_tts:
            raise ConfigError("enable_tts=True: this backend makes no speech; synthesise it first and pass audio_path")
        for name in ("tts_prompt_audio", "tts_prompt_text", "tts_text"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name}: only for enable_tts, which this backend does not have; leave it out")
        if not isinstance(self.input_prompt, str):
            raise InputError(f"input_prompt: expected text, not {self.input_prompt!r}")
        if not isinstance(self.ref_image_path, str | Path):
            raise InputError(f"ref_image_path: expected a picture's file, not {self.ref_image_path!r}")

    def _check_clip(self, frames_per_block: int) -> None:
        block = frames_per_block * LATENT_FRAME_STRIDE
        frames = self.infer_frames
        if not isinstance(frames, int) or isinstance(frames, bool) or frames < block or frames % block:
            raise ConfigError(
                f"infer_frames {frames!r}: a clip must be whole blocks of {block} video frames; pass a multiple of "
                f"{block}, such as {4 * block} as the reference's scripts do"
            )

    def _tell_what_counts_for_nothing(self) -> None:
        if self.guide_scale not in (0, 1):
            _log.warning("guide_scale %s: as in the reference, there is no guidance", self.guide_scale)
        if self.n_prompt:
            _log.warning("n_prompt: as in the reference, it is not used: there is no guidance")
        if self.shift != SHIFT:
            _log.warning("shift %s: as in the reference, the schedule's shift is %g", self.shift, SHIFT)
        if self.generate_size is not None:
            _log.info("generate_size %s: as in the reference, max_area (%d) decides", self.generate_size, self.max_area)


@dataclass(frozen=True)
class TppArguments(Arguments):
    """What `generate` of the TPP pipeline takes."""

    num_gpus_dit: int = 4


@dataclass(frozen=True)
class BlockwiseArguments(TppArguments):
    """What `generate` of the block-wise pipeline takes."""

    max_repeat: int = 100_000_000


def taking(kind: type[Arguments]) -> Callable[[Callable[[Any, Any], _Result]], Callable[..., _Result]]:
    """Let a method that takes `kind` be called with its fields, by position or name, and show them as its signature."""

    def decorate(method: Callable[[Any, Any], _Result]) -> Callable[..., _Result]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> _Result:
            signature.bind(self, *args, **kwargs)
            return method(self, kind(*args, **kwargs))

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        taken = [
            inspect.Parameter(field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=field.default)
            for field in fields(kind)
            if field.default is not MISSING
        ]
        signature = inspect.Signature([own, *taken])
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def _check_counts(arguments: Arguments, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(arguments, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be an integer, at least 1, not {value!r}")
