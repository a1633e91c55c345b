"""`generate` from the command line: the file it writes, and one clear error for everything that cannot be used."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import GOLDEN, speech, write_wav

from liveavatar_engine.cli import main
from liveavatar_engine.errors import WorkerError
from liveavatar_engine.pipeline.tpp.job import Job
from liveavatar_engine.pipeline.tpp.many_devices import ManyDevices
from liveavatar_engine.pipeline.tpp.trace import COMPUTE, DECODE, read_chrome_trace

NETWORK = "diffusion_pytorch_model.safetensors"


def _arguments(checkpoint, image, audio, out, *more: str, device: str | None = "cpu") -> list[str]:
    return [
        "generate", "--checkpoint", str(checkpoint), "--image", str(image), "--audio", str(audio), "--out", str(out),
        "--size", "64*64", *(() if device is None else ("--device", device)), *more,
    ]  # fmt: skip


def _decoded(path: Path) -> tuple[np.ndarray, float]:
    """Frames, and seconds of sound."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        sound = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    return frames, sound


def test_writes_a_video_as_long_as_its_sound(checkpoint, image, audio, tmp_path: Path, capsys) -> None:
    out = tmp_path / "face.mp4"
    assert main(_arguments(checkpoint, image, audio, out, "--prompt", "a person", "--seed", "3")) == 0
    frames, sound = _decoded(out)
    assert frames.shape == (38, 64, 64, 3)
    assert abs(sound - 1.5) < 0.05
    assert np.array_equal(frames[0], frames[1]), "the first frame is shown from 0"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "face.mp4: 64x64, 38 frames, 1.52 s" in captured.err.replace("\n", "")
    with av.open(str(out)) as container:
        assert "AI-generated" in container.metadata["comment"]
        assert container.streams.video[0].average_rate == 25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["face.mp4", "face.png", "speech.wav"]


@pytest.mark.parametrize("more", [("--schedule", "diagonal", "--no-graphs"), ("--kv-mode", "clean")], ids=" ".join)
def test_other_schedules_write_as_many_frames(more: tuple[str, ...], checkpoint, image, audio, tmp_path: Path) -> None:
    assert main(_arguments(checkpoint, image, audio, tmp_path / "face.mp4", *more)) == 0
    assert len(_decoded(tmp_path / "face.mp4")[0]) == 38


def test_several_devices_write_the_same_video(checkpoint, image, audio, tmp_path: Path, capsys) -> None:
    trace = tmp_path / "trace.json"
    assert main(_arguments(checkpoint, image, audio, tmp_path / "one.mp4")) == 0
    arguments = _arguments(checkpoint, image, audio, tmp_path / "two.mp4", *SEVERAL, "--trace", str(trace), device=None)
    assert main(arguments) == 0
    assert np.array_equal(_decoded(tmp_path / "one.mp4")[0], _decoded(tmp_path / "two.mp4")[0])
    spans, labels = read_chrome_trace(trace)
    assert sorted(labels) == [0, 1]
    assert {span.rank for span in spans if span.kind in (COMPUTE, DECODE)} == {0, 1}
    assert "Traceback" not in capsys.readouterr().err


def test_a_worker_that_fails_is_one_line(checkpoint, image, audio, tmp_path: Path, capsys, monkeypatch) -> None:
    def open_none(*_: object) -> None:
        raise WorkerError("rank 1 (decode on cpu:1): was killed by signal 9", 1, "decode", None)

    monkeypatch.setattr(ManyDevices, "open", open_none)
    for name in ("_start", "close"):
        monkeypatch.setattr(ManyDevices, name, lambda *_: None)
    arguments = _arguments(checkpoint, image, audio, tmp_path / "x.mp4", *SEVERAL, device=None)
    _fails(capsys, arguments, tmp_path, "rank 1 (decode on cpu:1): was killed by signal 9")


def test_only_the_first_process_of_a_job_writes(checkpoint, image, audio, tmp_path, capsys, monkeypatch) -> None:
    def serve(job: Job) -> None:
        raise SystemExit(0)

    names = {"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Job, "serve", serve)
    with pytest.raises(SystemExit) as ended:
        main(_arguments(checkpoint, tmp_path / "none.png", audio, tmp_path / "no" / "x.mp4", device=None))
    assert ended.value.code == 0
    assert capsys.readouterr() == ("", "")


def test_same_seed_same_file_content(checkpoint, image, audio, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        assert main(_arguments(checkpoint, image, audio, tmp_path / name, "--max-blocks", "2")) == 0
    (first, _), (second, _) = _decoded(tmp_path / "a.mp4"), _decoded(tmp_path / "b.mp4")
    assert np.array_equal(first, second)
    assert len(first) == 24


def test_lora_pose_and_the_papers_settings(checkpoint, image, audio, tmp_path: Path) -> None:
    pose = tmp_path / "pose.mp4"
    with av.open(str(pose), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        for index in range(30):
            picture = np.full((64, 64, 3), index * 8, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    plain, changed = tmp_path / "plain.mp4", tmp_path / "changed.mp4"
    assert main(_arguments(checkpoint, image, audio, plain)) == 0
    options = (
        "--lora", str(GOLDEN / "lora.safetensors"), "--pose-video", str(pose), "--sink-distance", "30",
        "--sink-update-after", "1", "--no-motion-tokens", "--steps", "3",
        "--precision", "bf16", "--features", "windowed",
    )  # fmt: skip
    assert main(_arguments(checkpoint, image, audio, changed, *options)) == 0
    assert _decoded(plain)[0].shape == _decoded(changed)[0].shape
    assert not np.array_equal(_decoded(plain)[0], _decoded(changed)[0])


def test_two_actors_are_mixed(checkpoint, image, tmp_path: Path) -> None:
    from PIL import Image

    for name, columns, seed, seconds in (("left", slice(0, 32), 1, 1.0), ("right", slice(48, 80), 2, 0.6)):
        mask = np.zeros((80, 80), np.uint8)
        mask[:, columns] = 255
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
        write_wav(tmp_path / f"{name}.wav", speech(seconds, seed))
    audio = f"{tmp_path / 'left.wav'}+{tmp_path / 'right.wav'}"
    masks = f"{tmp_path / 'left.png'}+{tmp_path / 'right.png'}"
    assert main(_arguments(checkpoint, image, audio, tmp_path / "two.mp4", "--actor-mask", masks)) == 0
    frames, sound = _decoded(tmp_path / "two.mp4")
    assert len(frames) == 25
    assert abs(sound - 1.0) < 0.05


def test_a_file_name_may_hold_a_plus(checkpoint, image, audio, tmp_path: Path) -> None:
    odd = audio.rename(tmp_path / "a+b.wav")
    assert main(_arguments(checkpoint, image, odd, tmp_path / "x.mp4", "--max-blocks", "1")) == 0


def test_watermark_hook(checkpoint, image, audio, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "marks.py").write_text("def white(frames, first):\n    frames[:, :16] = 255\n    return frames\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "x.mp4"
    assert main(_arguments(checkpoint, image, audio, out, "--max-blocks", "1", "--watermark", "marks:white")) == 0
    assert _decoded(out)[0][:, 2:12].min() > 200


# --- interruption


SEVERAL = ("--devices", "cpu:0,cpu:1", "--stage-ms", "1,1")


@pytest.mark.parametrize(
    ("number", "code", "word", "devices"),
    [
        (signal.SIGINT, 130, "interrupted", ("--device", "cpu")),
        (signal.SIGTERM, 143, "terminated", ("--device", "cpu")),
        (signal.SIGTERM, 143, "terminated", SEVERAL),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM with two devices"],
)
def test_interruption_leaves_a_playable_file(
    number: signal.Signals, code: int, word: str, devices: tuple[str, ...], checkpoint, image, tmp_path: Path
) -> None:
    audio = write_wav(tmp_path / "long.wav", speech(55))
    out = tmp_path / "cut.mp4"
    arguments = _arguments(checkpoint, image, audio, out, *devices, device=None)
    command = [sys.executable, "-m", "liveavatar_engine", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    part = tmp_path / ".cut.part.mp4"
    deadline = time.time() + 60
    while time.time() < deadline and not (part.exists() and part.stat().st_size > 2000):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{word}; kept what was made" in errors
    assert "Traceback" not in errors
    frames, sound = _decoded(out)
    assert 12 <= len(frames) < 55 * 25
    assert abs(sound - len(frames) / 25) < 0.05
    assert not part.exists()


# --- what cannot be used


def _fails(capsys, arguments: list[str], tmp_path: Path, message: str) -> None:
    """The command ends with code 2, one line that holds `message`, and no new file."""
    before = sorted(tmp_path.rglob("*"))
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    errors = capsys.readouterr().err
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--image", "{tmp}/none.png", "none.png"),
        ("--image", "{tmp}", "is a directory"),
        ("--image", "{audio}", "is not an image"),
        ("--audio", "{tmp}/none.wav", "none.wav"),
        ("--audio", "{image}", "face.png"),
        ("--audio", "{tmp}/junk.wav", "junk.wav"),
        ("--audio", "{tmp}/empty.wav", "empty.wav"),
        ("--audio", "{tmp}/silent.wav", "silent.wav"),
        ("--audio", "{audio}++{audio}", "file names joined by +"),
        ("--audio", "{audio}+{audio}", "2 audio tracks and 0 actor masks"),
        ("--checkpoint", "{tmp}/none", "no such directory"),
        ("--checkpoint", "{tmp}", "it lacks"),
        ("--lora", "{tmp}/none.safetensors", "none.safetensors: no such file"),
        ("--pose-video", "{audio}", "speech.wav"),
        ("--pose-video", "{tmp}/none.mp4", "none.mp4"),
        ("--actor-mask", "{image}+{image}", "1 audio tracks and 2 actor masks"),
        ("--size", "8*8", "64 to 4096"),
        ("--size", "100000*100000", "64 to 4096"),
        ("--size", "big", "expected W*H"),
        ("--size", "70x70", "multiples of 16"),
        ("--seed", "-1", "seed must be an integer, 0 to"),
        ("--seed", "x", "invalid int value"),
        ("--steps", "0", "steps must be an integer, 1 to 1000"),
        ("--max-blocks", "0", "max_blocks must be"),
        ("--precision", "fp4", "invalid choice"),
        ("--device", "cuda:55", "cuda:55"),
        ("--devices", "cpu:0,cpu:1", "--device and --devices: give one of them"),
        ("--trace", "{tmp}/trace.json", "trace: a timeline is drawn of several devices"),
        ("--trace", "{tmp}/no/trace.json", "does not exist"),
        ("--stage-ms", "110", "--stage-ms '110': expected two times in ms"),
        ("--sequence-parallel", "2", "sequence_parallel=2 needs as many devices"),
        ("--sink-distance", "near", "--sink-distance must be 'random' or an integer"),
        ("--sink-update-after", "soon", "--sink-update-after must be 'never' or an integer"),
        ("--watermark", "nothing", "MODULE:FUNCTION"),
        ("--out", "{tmp}/no/such/folder/x.mp4", "does not exist"),
        ("--out", "{tmp}", "is a directory"),
        ("--out", "{image}/x.mp4", "is not a folder"),
        ("--frobnicate", "1", "unrecognized arguments"),
    ],
    ids=lambda value: value.replace("{", "").replace("}", ""),
)
def test_bad_input(option: str, value: str, message: str, checkpoint, image, audio, tmp_path, capsys) -> None:
    (tmp_path / "junk.wav").write_bytes(os.urandom(3000))
    (tmp_path / "empty.wav").write_bytes(b"")
    write_wav(tmp_path / "silent.wav", np.zeros(0))
    filled = value.format(tmp=tmp_path, audio=audio, image=image)
    _fails(capsys, [*_arguments(checkpoint, image, audio, tmp_path / "x.mp4"), option, filled], tmp_path, message)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def _break(copy: Path, how: str) -> None:
    network = copy / NETWORK
    match how:
        case "truncated":
            os.truncate(network, network.stat().st_size // 2)
        case "corrupt":
            network.write_bytes(b"\xff" * 1000)
        case "shapes":
            state = load_file(network)
            save_file({**state, "head.head.bias": torch.zeros(3)}, network)
        case "tokenizer":
            shutil.rmtree(copy / "google")
        case "pickle":
            (copy / "Wan2.1_VAE.pth").write_bytes(pickle.dumps({"weight": os.system}))
        case "config":
            (copy / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "damaged, truncated"),
        ("corrupt", "not a safetensors file"),
        ("shapes", "head.head.bias is [3], expected [64]"),
        ("tokenizer", "google/umt5-xxl/ (tokenizer"),
        ("pickle", "Wan2.1_VAE.pth: not a PyTorch file of plain tensors"),
        ("config", "lacks dim"),
    ],
)
def test_broken_checkpoints(how: str, message: str, copy, image, audio, tmp_path, capsys) -> None:
    _break(copy, how)
    _fails(capsys, _arguments(copy, image, audio, tmp_path / "x.mp4"), tmp_path, message)


def test_nan_weights_leave_no_file(copy, image, audio, tmp_path, capsys) -> None:
    state = load_file(copy / NETWORK)
    state["blocks.0.ffn.2.bias"][0] = float("nan")
    save_file(state, copy / NETWORK)
    _fails(capsys, _arguments(copy, image, audio, tmp_path / "x.mp4"), tmp_path, "block 0: the latents are not finite")


def test_a_lora_of_another_model(checkpoint, image, audio, tmp_path, capsys) -> None:
    other = {
        "blocks.50.self_attn.q.lora_A.weight": torch.zeros(4, 8),
        "blocks.50.self_attn.q.lora_B.weight": torch.zeros(8, 4),
    }
    save_file(other, tmp_path / "other.safetensors")
    arguments = _arguments(checkpoint, image, audio, tmp_path / "x.mp4", "--lora", str(tmp_path / "other.safetensors"))
    _fails(capsys, arguments, tmp_path, "a LoRA for another model")


def test_a_full_disk_leaves_nothing(checkpoint, image, tmp_path: Path) -> None:
    """The system refuses to let any file grow beyond 20 KB."""
    audio = write_wav(tmp_path / "long.wav", speech(8))
    out = tmp_path / "out"
    out.mkdir()
    script = (
        "import resource, signal, sys\n"
        "from liveavatar_engine.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, *_arguments(checkpoint, image, audio, out / "x.mp4")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stderr
    assert "x.mp4" in run.stderr
    assert "Nothing was left behind" in run.stderr
    assert list(out.iterdir()) == []


def test_help_and_version_answer_without_torch() -> None:
    script = "import sys; sys.modules['torch'] = None\nfrom liveavatar_engine.cli import main\nmain(sys.argv[1:])"
    for arguments in (
        ["--help"],
        ["generate", "--help"],
        ["make-checkpoint", "--help"],
        ["inspect", "--help"],
        ["--version"],
    ):
        run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr
        assert "examples:" in run.stdout or arguments == ["--version"]
