"""What `generate` is given, read and checked before any weight is loaded."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ..conditions.actors import actor_mask
from ..conditions.audio_encoder import FEATURE_RATE, STATE_RATE, state_moments
from ..conditions.still import to_pixels
from ..config import ModelConfig, Size, StreamGeometry
from ..config.fit import fit_to_area
from ..config.geometry import FRAMES_PER_SECOND, LATENT_FRAME_STRIDE
from ..denoise.noise import MAX_SEED, check_seed
from ..errors import InputError
from ..pipeline import inputs
from .arguments import Arguments

_log = logging.getLogger(__name__)
_SAM2_TOOL = Path("liveavatar/utils/router/sam2_tools.py")
_SAM2_RESULTS = "tracking_mask_results"
_FIRST_FRAME = "annotated_frame_00000.png"


@dataclass(frozen=True)
class Inputs:
    """What a video is made of.

    Attributes:
        geometry: of its blocks; the ring holds a clip.
        pixels: the portrait, float32 [3, height, width] in [-1, 1].
        prompt: what the scene shows.
        seed: of noise and sink distances.
        speech: of each actor, float32 [samples] at 16 kHz.
        clips: how many are made.
        mask: [actors, frames or 1, tokens_per_frame, 1], or None.
    """

    geometry: StreamGeometry
    pixels: Tensor
    prompt: str
    seed: int
    speech: list[np.ndarray]
    clips: int
    mask: Tensor | None

    @classmethod
    def read(
        cls, arguments: Arguments, model: ModelConfig, frames_per_block: int, clips: int | None, *, listens: bool
    ) -> Inputs:
        """Read everything; of a pose video, only whether it can be read.

        Args:
            arguments: checked.
            model: sizes of the network.
            frames_per_block: latent frames of a block.
            clips: most that are wanted; None: as many as the speech lasts.
            listens: whether the speech comes from elsewhere.

        Raises:
            InputError: a file or the mask cannot be used.
            ConfigError: the model cannot make pictures of this size.
        """
        from ..media.image import load_image
        from ..media.video import probe_video

        assert arguments.ref_image_path is not None
        assert arguments.input_prompt is not None
        picture = load_image(arguments.ref_image_path)
        height, width = fit_to_area(picture.height, picture.width, arguments.max_area)
        ring_frames = arguments.infer_frames // LATENT_FRAME_STRIDE
        geometry = StreamGeometry(model, height, width, frames_per_block, ring_frames)
        pixels = to_pixels(inputs.portrait(picture, Size(width, height, exact=True)))
        speech = [] if listens else read_speech(arguments.audio_path)
        if arguments.pose_video is not None:
            probe_video(arguments.pose_video)
        lasting = [clip_count(len(samples), arguments.infer_frames) for samples in speech]
        clips = min([arguments.max_repeat, clips or arguments.max_repeat, *lasting])
        mask = _mask(arguments, geometry, max(1, len(speech)))
        return cls(geometry, pixels, arguments.input_prompt, _seed(arguments.seed), speech, clips, mask)


def read_speech(paths: str | Path | None) -> list[np.ndarray]:
    """Speech of the files that `paths` joins by "+", one per actor; of several, cut to the shortest.

    Raises:
        InputError: there is no path, or a file cannot be read.
    """
    if paths is None:
        raise InputError("audio_path: expected a sound file, not None")
    from ..media.audio import load_speech

    speech = [load_speech(path) for path in str(paths).split("+")]
    shortest = min(map(len, speech))
    return [samples[:shortest] for samples in speech]


def clip_count(samples: int, clip_frames: int) -> int:
    """Clips of a speech: int(features / (clip_frames * 1.2)) + 1, so the last one is silent in part, or wholly."""
    features = state_moments(samples) * FEATURE_RATE // STATE_RATE
    return features * FRAMES_PER_SECOND // (clip_frames * FEATURE_RATE) + 1


def _seed(seed: int) -> int:
    """Any seed for a negative one; those above the largest, which scripts draw as well, begin anew at 0."""
    if isinstance(seed, int) and seed < 0:
        return random.randrange(MAX_SEED)
    return check_seed(seed - MAX_SEED - 1 if isinstance(seed, int) and seed > MAX_SEED else seed)


def _mask(arguments: Arguments, geometry: StreamGeometry, actors: int) -> Tensor | None:
    """The mask that is given, or that of SAM2 where there are several actors."""
    if arguments.input_video_for_sam2 is not None and (arguments.mask is not None or actors == 1):
        _log.warning("input_video_for_sam2: not used: SAM2 makes masks of several actors, where none is given")
    if arguments.mask is not None:
        return check_mask(arguments.mask, geometry, actors)
    if actors == 1:
        return None
    assert arguments.ref_image_path is not None
    masks = _sam2_masks(Path(arguments.input_video_for_sam2 or arguments.ref_image_path), actors)
    return actor_mask(masks, geometry)


def check_mask(mask: Tensor, geometry: StreamGeometry, actors: int) -> Tensor:
    """A mask [actors, frames, rows, columns, 1] as blocks use it: [actors, frames or 1, tokens_per_frame, 1].

    As in the reference, its first frames count in every block.

    Raises:
        InputError: another shape.
    """
    frames = geometry.frames_per_block
    wanted = (actors, geometry.grid_rows, geometry.grid_columns, 1)
    fits = isinstance(mask, Tensor) and mask.ndim == 5 and (mask.shape[0], *mask.shape[2:]) == wanted
    if not fits or 1 < mask.shape[1] < frames or not mask.shape[1]:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"mask: expected a tensor [{actors}, {frames} or more frames, or 1, {geometry.grid_rows}, "
            f"{geometry.grid_columns}, 1] (actors, frames, rows and columns of tokens), not {found}"
        )
    return mask[:, :frames].flatten(2, 3).float()


def _sam2_masks(pictured: Path, actors: int) -> list[np.ndarray]:
    """Masks that the reference's SAM2 tool has made of a picture or video, or makes now: bool [height, width] each."""
    from PIL import Image

    folder = pictured.parent / pictured.name.split(".")[0] / _SAM2_RESULTS
    if not folder.is_dir():
        _run_sam2(pictured)
    masks = []
    for actor in range(1, actors + 1):
        file = folder / str(actor) / _FIRST_FRAME
        if not file.is_file():
            raise InputError(f"{actors} audio tracks, but no mask of actor {actor}: {file} is not there; pass mask=...")
        with Image.open(file) as image:
            masks.append(np.asarray(image.convert("L")) > 0)
    return masks


def _run_sam2(pictured: Path) -> None:
    if not _SAM2_TOOL.is_file():
        raise InputError(
            f"several audio tracks need a mask per actor: pass mask=..., or run where the reference's {_SAM2_TOOL} is"
        )
    command = [sys.executable, str(_SAM2_TOOL), "--video_folder", str(pictured), "--output_path", str(pictured.parent)]
    _log.info("running SAM2: %s", " ".join(command))
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"SAM2 made no masks of {pictured}: {error}") from error
