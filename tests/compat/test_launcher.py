"""A script with the reference's imports, flags and calls, as it is, on this engine."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compat.pipeline_calls import Files, reference_config
from support import OWN_GOLDEN
from torch import distributed

from liveavatar_engine.compat import TppWanS2V, WanS2V, replace_linear_with_scaled_fp8
from liveavatar_engine.compat.launcher import main
from liveavatar_engine.config.engine import REFERENCE_FP8_SKIP
from liveavatar_engine.media.audio import load_speech
from liveavatar_engine.media.video import iter_video_frames

SCRIPT = Path(__file__).parent / "reference_like" / "minimal_inference" / "interact.py"
TRAINED = {
    "lora_rank": 4,
    "lora_alpha": 2.0,
    "lora_target_modules": "q,k,v,o,ffn.0,ffn.2",
    "init_lora_weights": "kaiming",
}


class _Run:
    """The script's flags for a small video, and what came of it."""

    def __init__(self, folder: Path, face: np.ndarray, checkpoint: Path) -> None:
        self.files, self.out = Files(folder, face), folder / "out.mp4"
        training = folder / "training.json"
        training.write_text(json.dumps(TRAINED))
        flags = {
            "ckpt_dir": checkpoint,
            "prompt": "a person talks",
            "image": self.files.image,
            "audio": self.files.audio,
            "save_file": self.out,
            "training_config": training,
            "sample_steps": 2,
            "sample_guide_scale": 0,
            "infer_frames": 48,
            "num_clip": 1,
            "base_seed": 7,
            "lora_path_dmd": OWN_GOLDEN / "lora.safetensors",
        }
        self.flags = [str(SCRIPT), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]

    def frames(self) -> np.ndarray:
        return np.stack(list(iter_video_frames(self.out, 25)))


@pytest.fixture
def run(tmp_path: Path, face: np.ndarray, checkpoint: Path) -> _Run:
    return _Run(tmp_path, face, checkpoint)


def _subprocess(*command: str) -> None:
    root = Path(__file__).parents[2]
    paths = {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"} | paths
    ran = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def _check_video(run: _Run, expected: torch.Tensor) -> None:
    """The file shows the video and holds as much sound."""
    frames = torch.from_numpy(run.frames()).permute(3, 0, 1, 2).float() / 127.5 - 1
    assert frames.shape == expected.shape
    shown, wanted = (video.mean(dim=0) for video in (frames, expected))
    likeness = [
        float(torch.corrcoef(torch.stack((shown.flatten(), wanted.roll(late, 0).flatten())))[0, 1])
        for late in (0, -1, 1)
    ]
    assert likeness[0] > max(0.85, *(other + 0.1 for other in likeness[1:])), "twice through H.264, the same video"
    assert abs(len(load_speech(run.out)) / 16_000 - 45 / 25) < 0.1


@pytest.mark.slow
def test_a_script_started_by_torchrun_writes_its_video(run: _Run, checkpoint: Path) -> None:
    job = ("torch.distributed.run", "--standalone", "--nproc_per_node=1")
    _subprocess(*job, "-m", "liveavatar_engine.compat", *run.flags, "--load_lora", "--fp8")
    pipeline = WanS2V(reference_config(), checkpoint)
    pipeline.add_lora_to_model(pipeline.noise_model, 4, 2.0, pretrained_lora_path=OWN_GOLDEN / "lora.safetensors")
    replace_linear_with_scaled_fp8(pipeline.noise_model, list(REFERENCE_FP8_SKIP))
    expected, _ = pipeline.generate(**run.files.arguments(num_repeat=1))
    _check_video(run, expected)


def test_a_script_writes_its_video_and_everything_is_put_back(run: _Run, checkpoint: Path) -> None:
    def state():
        return (
            builtins.__import__,
            list(sys.meta_path),
            list(sys.argv),
            list(sys.path),
            dict(os.environ),
            torch.cuda.set_device,
            distributed.init_process_group,
            {name for name in sys.modules if name.startswith("liveavatar.")},
        )

    before = state()
    assert main([*run.flags, "--tpp"]) == 0
    assert state() == before
    expected, _ = TppWanS2V(reference_config(), checkpoint).generate(**run.files.arguments(num_repeat=1))
    _check_video(run, expected)


def test_an_option_whose_package_is_missing(run: _Run, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([*run.flags, "--use_prompt_extend"]) == 2
    finally:
        distributed.destroy_process_group()
    assert "this option of the script needs dashscope, which is not installed" in capsys.readouterr().err
    assert not run.out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--infer_frames", "80"], "infer_frames 80: a clip must be whole blocks of 12 video frames"),
        (["--sample_solver", "unipc"], "sample_solver 'unipc': the reference only runs 'euler'"),
        (["--offload_kv_cache"], "offload_kv_cache=True: rings stay on the device"),
        (["--image", "nobody.png"], "nobody.png"),
    ],
)
def test_what_the_backend_refuses_is_one_message(
    flags: list[str], message: str, run: _Run, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main([*run.flags, *flags]) == 2
    finally:
        distributed.destroy_process_group()
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_script_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["nowhere.py"])
    assert exit_.value.code == 2
    assert "nowhere.py: no such file" in capsys.readouterr().err


def test_a_strange_job(run: _Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert main(run.flags) == 2
    assert "RANK: torchrun sets it to a number" in capsys.readouterr().err
