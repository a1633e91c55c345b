"""Videos to files."""

from pathlib import Path

import numpy as np
import torch

from liveavatar_engine.media.mp4 import Mp4Writer
from liveavatar_engine.media.soundtrack import Soundtrack
from liveavatar_engine.media.video import iter_video_frames


def str2bool(text: str) -> bool:
    return text.lower() in ("yes", "true", "1")


def save_video(tensor: torch.Tensor, save_file: str, fps: int, value_range: tuple[int, int]) -> None:
    """[1, 3, frames, height, width] in `value_range`, digits cut off."""
    low, high = value_range
    levels = ((tensor[0].clamp(low, high) - low) / (high - low) * 255).type(torch.uint8)
    frames = levels.permute(1, 2, 3, 0).numpy()
    with Mp4Writer(save_file, frames.shape[2], frames.shape[1], fps) as writer:
        writer.write(frames, 0)


def merge_video_audio(video_path: str, audio_path: str) -> None:
    frames = np.stack(list(iter_video_frames(video_path, 25)))
    Path(video_path).unlink()
    with Mp4Writer(video_path, frames.shape[2], frames.shape[1], 25, Soundtrack([audio_path])) as writer:
        writer.write(frames, 0)
