"""Live speech, pose videos and several actors, through the pipelines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compat.pipeline_calls import Files, LiveSource, observed, reference_config
from PIL import Image
from support import GOLDEN, GoldenCase, speech, write_wav
from torch import Tensor

from liveavatar_engine.compat import BlockwiseWanS2V, TppWanS2V, WanS2V
from liveavatar_engine.compat.arguments import TppArguments
from liveavatar_engine.compat.clips import ClipMaker
from liveavatar_engine.compat.inputs import clip_count, read_speech
from liveavatar_engine.denoise.stream import LatentStream
from liveavatar_engine.errors import InputError
from liveavatar_engine.media.mp4 import Mp4Writer

SAM2_TOOL = """
import argparse, pathlib
from PIL import Image

parser = argparse.ArgumentParser()
parser.add_argument("--video_folder", type=pathlib.Path)
parser.add_argument("--output_path", type=pathlib.Path)
given = parser.parse_args()
for actor, box in ((1, (0, 0, 32, 64)), (2, (32, 0, 64, 64))):
    folder = given.output_path / given.video_folder.stem / "tracking_mask_results" / str(actor)
    folder.mkdir(parents=True)
    mask = Image.new("L", (64, 64))
    mask.paste(255, box)
    mask.save(folder / "annotated_frame_00000.png")
"""


@pytest.fixture
def files(tmp_path: Path, face: np.ndarray) -> Files:
    return Files(tmp_path, face)


@pytest.fixture(scope="module")
def pipelines(checkpoint: Path) -> dict[type, Any]:
    return {kind: kind(reference_config(), checkpoint) for kind in (WanS2V, TppWanS2V, BlockwiseWanS2V)}


@pytest.fixture
def live(pipelines):
    pipeline = pipelines[BlockwiseWanS2V]
    yield pipeline
    pipeline.get_audio_callback, pipeline.noise_clips = None, 0


def _latents(pipeline, arguments: dict[str, Any]) -> dict[int, Tensor]:
    seen = observed(pipeline)
    made = pipeline.generate(**arguments)
    if not isinstance(made, tuple):
        assert [chunk.shape[:3] for chunk in made][:2] == [(1, 3, 9), (1, 3, 12)][: len(seen)]
    return seen


@pytest.fixture(scope="class")
def played(pipelines, tmp_path_factory: pytest.TempPathFactory, face: np.ndarray) -> dict[int, Tensor]:
    """Latents of a file that is played."""
    files = Files(tmp_path_factory.mktemp("played"), face)
    return _latents(pipelines[BlockwiseWanS2V], files.arguments(sampling_steps=1, num_repeat=1))


class TestLiveSpeech:
    def test_how_it_is_cut_up_changes_nothing_but_what_is_said_does(self, live, files: Files) -> None:
        other, made = write_wav(files.audio.with_name("other.wav"), speech(2.2, seed=5)), []
        for source in (
            LiveSource(files.audio, 7680),
            LiveSource(files.audio, 1000, 20_000, 3),
            LiveSource(other, 7680),
        ):
            live.get_audio_callback = source
            made.append(_latents(live, files.arguments(audio_path=None, sampling_steps=1)))
        assert len(made[0]) == 5, "it ends with the speech"
        assert all(made[0][block].equal(made[1][block]) for block in range(5))
        assert not torch.allclose(made[0][0], made[2][0])

    def test_it_ends_after_max_repeat_clips(self, live, files: Files) -> None:
        live.get_audio_callback = lambda: np.zeros(7680, np.float32)
        assert len(_latents(live, files.arguments(max_repeat=2, sampling_steps=1))) == 8

    def test_num_repeat_does_not_count(self, played) -> None:
        assert len(played) == 8

    def test_samples_of_another_kind(self, live, files: Files) -> None:
        live.get_audio_callback = lambda: np.zeros((2, 100), np.float32)
        with pytest.raises(InputError, match="one axis"):
            list(live.generate(**files.arguments()))

    def test_clips_of_noise_in_front(self, live, played, files: Files) -> None:
        live.noise_clips = 1
        noisy = _latents(live, files.arguments(sampling_steps=1, max_repeat=2))
        assert len(noisy) == 8, "clips of noise count as clips"
        assert not torch.allclose(played[0], noisy[0])
        live.noise_clips = 2
        longer = _latents(live, files.arguments(sampling_steps=1, max_repeat=2))
        assert all(noisy[block].equal(longer[block]) for block in range(4))
        assert not torch.allclose(noisy[4], longer[4]), "speech behind one clip of noise"


def test_longer_speech_is_encoded_in_windows(pipelines, files: Files, caplog) -> None:
    pipeline, arguments = pipelines[TppWanS2V], files.arguments(sampling_steps=1, max_repeat=1)
    whole = _latents(pipeline, arguments)
    assert "encoded in windows" not in caplog.text
    pipeline.whole_speech_seconds = 2
    try:
        windowed = _latents(pipeline, arguments)
    finally:
        del pipeline.whole_speech_seconds
    assert "audio longer than 2 s: encoded in windows" in caplog.text
    assert not torch.equal(whole[0], windowed[0])


class TestPose:
    @pytest.fixture
    def video(self, tmp_path: Path) -> Path:
        """One clip: a bar that moves."""
        frames = np.zeros((48, 64, 64, 3), np.uint8)
        for index, frame in enumerate(frames):
            frame[:, index : index + 16] = 255
        with Mp4Writer(tmp_path / "pose.mp4", 64, 64) as writer:
            writer.write(frames, 0)
        return tmp_path / "pose.mp4"

    def test_it_steers(self, pipelines, files: Files, video: Path, monkeypatch) -> None:
        monkeypatch.setattr(ClipMaker, "decode", lambda *_: torch.zeros(3, 48, 64, 64))  # latents are looked at
        for kind in (WanS2V, TppWanS2V):
            settings = files.arguments(max_repeat=1, sampling_steps=1)
            plain, posed = (_latents(pipelines[kind], {**settings, "pose_video": pose}) for pose in (None, video))
            assert not torch.allclose(plain[0], posed[0])

    def test_live_a_clips_first_pose_counts_for_all_its_blocks(self, live, files, video: Path, monkeypatch) -> None:
        seen: list[Tensor] = []
        push = LatentStream.push
        monkeypatch.setattr(
            LatentStream, "push", lambda self, noise, states, pose: seen.append(pose) or push(self, noise, states, pose)
        )
        _latents(live, files.arguments(max_repeat=2, sampling_steps=1, pose_video=video))
        assert len(seen) == 8
        assert all(seen[0].equal(pose) for pose in seen[:4])
        assert not seen[0].equal(seen[4]), "the second clip is black"


class TestActors:
    def two(self, files: Files, **changes: Any) -> dict[str, Any]:
        other = write_wav(files.audio.with_name("other.wav"), speech(1.0, seed=3))
        both = {"audio_path": f"{files.audio}+{other}", "sampling_steps": 1, "max_repeat": 1}
        return files.arguments(**{**both, **changes})

    def test_a_mask_says_what_each_moves(self, pipelines, files: Files) -> None:
        left = torch.zeros(2, 12, 4, 4, 1)
        left[0, :, :, :2], left[1, :, :, 2:] = 1, 1
        made = [
            _latents(pipelines[TppWanS2V], self.two(files, mask=mask)) for mask in (left, left.flip(0), left[:, :1])
        ]
        assert not torch.allclose(made[0][0], made[1][0])
        assert made[0][0].equal(made[2][0])

    def test_sam2_is_asked_where_there_is_no_mask(self, pipelines, files: Files, monkeypatch) -> None:
        monkeypatch.chdir(files.image.parent)
        with pytest.raises(InputError, match=r"several audio tracks need a mask per actor: pass mask=.*sam2_tools\.py"):
            pipelines[TppWanS2V].generate(**self.two(files))
        tool = Path("liveavatar/utils/router/sam2_tools.py")
        tool.parent.mkdir(parents=True)
        tool.write_text(SAM2_TOOL)
        made = _latents(pipelines[TppWanS2V], self.two(files))
        tool.write_text("raise SystemExit(1)")
        assert made[0].equal(_latents(pipelines[TppWanS2V], self.two(files))[0]), "masks that are there are used"
        portrait = files.image.with_name("other.png")
        Image.open(files.image).save(portrait)
        with pytest.raises(InputError, match="SAM2 made no masks"):
            pipelines[TppWanS2V].generate(**self.two(files, ref_image_path=portrait))
        again = self.two(files, ref_image_path=portrait, input_video_for_sam2=files.image)
        assert made[0].equal(_latents(pipelines[TppWanS2V], again)[0])

    def test_a_mask_too_few(self, pipelines, files: Files, monkeypatch) -> None:
        folder = files.image.parent / "face" / "tracking_mask_results" / "1"
        folder.mkdir(parents=True)
        Image.new("L", (64, 64), 255).save(folder / "annotated_frame_00000.png")
        with pytest.raises(InputError, match="2 audio tracks, but no mask of actor 2"):
            pipelines[TppWanS2V].generate(**self.two(files))

    def test_the_shortest_speech_counts(self, files: Files) -> None:
        two = read_speech(self.two(files)["audio_path"])
        assert len(two[0]) == len(two[1]) == 16_000


def test_every_seed_that_scripts_draw_can_be_used(pipelines, files: Files) -> None:
    read = pipelines[TppWanS2V]._read
    seeds = [read(TppArguments(**files.arguments(seed=seed)), None).seed for seed in (7, 2**62, sys.maxsize, -1)]
    assert seeds[:3] == [7, 2**62, sys.maxsize - 2**62 - 1]
    assert 0 <= seeds[3] < 2**62


def test_clips_of_the_golden_waveform() -> None:
    case = GoldenCase.load(GOLDEN / "cases" / "audio.safetensors")
    samples = case["waveform"].shape[-1]
    assert clip_count(samples, case.parameters["clip_frames"]) == case.parameters["num_clips"]


def test_encoders_on_their_own(pipelines, files: Files, face: np.ndarray) -> None:
    pipeline = pipelines[TppWanS2V]
    columns, clips = pipeline.encode_audio(files.audio, 48)
    assert (columns.shape, clips) == ((1, 25, 16, 96), 2)
    assert not columns[..., 60:].any(), "zero past the end"
    live = pipelines[BlockwiseWanS2V]
    assert live.encode_audio_from_array(files.samples, 48)[0].shape == columns.shape
    with pytest.raises(InputError, match="sample_rate must be 16000, not 44100"):
        live.audio_encoder.extract_audio_feat_from_array(files.samples, sample_rate=44_100)
    context, negative = pipeline.encode_prompt("a person", n_prompt="")
    assert context[0].shape[1] == negative[0].shape[1] == 24
    assert pipeline.encode_prompt("a person")[1] is None
    video = torch.from_numpy(face).permute(2, 0, 1)[:, None].float() / 127.5 - 1
    (latents,) = pipeline.vae.encode(video.expand(-1, 5, -1, -1)[None])
    assert latents.shape == (16, 2, 8, 8)
    (decoded,) = pipeline.vae.decode([latents])
    assert decoded.shape == (3, 5, 64, 64)
    for encoder in (pipeline.vae, pipeline.audio_encoder):
        assert next(encoder.model.parameters()).dtype == torch.float32


def test_the_golden_audio_columns(golden_checkpoint, tmp_path: Path) -> None:
    case = GoldenCase.load(GOLDEN / "cases" / "audio.safetensors")
    pipeline = TppWanS2V(reference_config(), golden_checkpoint)
    columns, clips = pipeline.audio_encoder.get_audio_embed_bucket_fps(case["features_30hz"], 25, 48)
    assert clips == 2
    assert torch.allclose(columns.permute(1, 2, 0)[None], case["audio_input"], atol=1e-5)
