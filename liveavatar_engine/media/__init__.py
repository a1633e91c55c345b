"""Files in and out: portraits, masks, sound and video are read here, and the finished mp4 is written."""

from .audio import AudioInfo, iter_speech, load_speech, probe_audio
from .image import load_image, load_mask, resize_and_crop
from .mp4 import Mp4Writer, Watermark
from .soundtrack import SoundSource, Soundtrack
from .video import VideoInfo, iter_video_frames, probe_video

__all__ = [
    "AudioInfo",
    "Mp4Writer",
    "SoundSource",
    "Soundtrack",
    "VideoInfo",
    "Watermark",
    "iter_speech",
    "iter_video_frames",
    "load_image",
    "load_mask",
    "load_speech",
    "probe_audio",
    "probe_video",
    "resize_and_crop",
]
