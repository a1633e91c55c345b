"""Engines in torchrun jobs, on one node and on two."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from liveavatar_kernels.environment import Environment, Torchrun
from pipelines import Beats, pipeline, session

from liveavatar_engine.config import EngineConfig
from liveavatar_engine.errors import ConfigError
from liveavatar_engine.pipeline.assembly import choose_plan, device_names
from liveavatar_engine.pipeline.tpp.crew import Crew
from liveavatar_engine.pipeline.tpp.job import Job

SCRIPT = Path(__file__).with_name("job_script.py")
JOB = {
    "TORCHELASTIC_RUN_ID": "1",
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def _torchrun(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    out = tmp_path_factory.mktemp("alone") / "out.npz"
    subprocess.run([sys.executable, str(SCRIPT), str(checkpoint), str(out), "cpu"], check=True)
    return np.load(out)["frames"][0]


def test_the_first_rank_of_a_job_gets_the_engine_and_the_others_serve_it(
    checkpoint: Path, tmp_path: Path, alone: np.ndarray
) -> None:
    out = tmp_path / "out.npz"
    job = _torchrun("--standalone", "--nproc-per-node", "3", str(SCRIPT), str(checkpoint), str(out))
    printed, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert printed.count("the first rank has written") == 1
    made = np.load(out)
    assert list(made["stages"]) == ["steps 0-1", "steps 2-3", "decode"]
    assert all(np.array_equal(frames, alone) for frames in made["frames"])


def test_a_job_on_two_nodes(checkpoint: Path, tmp_path: Path, alone: np.ndarray) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "out.npz"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    nodes = [
        _torchrun("--nnodes", "2", "--nproc-per-node", "1", *meeting, str(SCRIPT), str(checkpoint), str(out))
        for _ in range(2)
    ]
    ended = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(errors for _, errors in ended)
    made = np.load(out)
    assert list(made["stages"]) == ["steps 0-1", "steps 2-3 + decode"]
    assert all(np.array_equal(frames, alone) for frames in made["frames"])


def test_frames_of_another_machine_come_over_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crew, "is_here", lambda self, rank: False)
    with pipeline(3, early_first_frame=True) as runner:
        chunks = list(session(runner, Beats(5)))
        assert not runner._frames
    assert [len(chunk.frames) for chunk in chunks] == [1, 8, 12, 12, 12, 12]
    assert all((chunk.frames == 4).all() for chunk in chunks)


# --- what torchrun tells


def test_the_environment_of_a_job_is_read() -> None:
    assert Environment.read({}).torchrun is None
    assert Environment.read({"RANK": "1", "WORLD_SIZE": "2"}).torchrun is None, "some other launcher"
    assert Environment.read(JOB).torchrun == Torchrun(1, 4, 2, ("node0", 29500))
    with pytest.raises(ValueError, match="WORLD_SIZE: torchrun sets it to a number"):
        Environment.read({**JOB, "WORLD_SIZE": "many"})


def test_every_rank_of_a_job_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(0, 4, 2, ("node0", 29500))
    assert job.nodes == 2
    assert device_names(EngineConfig(), job) == ("cpu:0", "cpu:1", "cpu:2", "cpu:3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert job.device_names() == ("cuda:0@0", "cuda:1@0", "cuda:0@1", "cuda:1@1")
    assert device_names(EngineConfig(), job) == job.device_names()
    assert len(choose_plan(EngineConfig(), job.device_names()).ranks) == 4


@pytest.mark.parametrize("devices", [("cpu:0", "cpu:1"), tuple(f"cpu:{index}" for index in range(5))])
def test_a_job_of_another_size_is_refused(devices: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"{len(devices)} are named, and torchrun has started 4 processes"):
        device_names(EngineConfig(devices=devices), Job(0, 4, 4, ("localhost", 29500)))


def test_one_device_in_a_job_is_an_engine_of_its_own() -> None:
    assert device_names(EngineConfig(devices="cpu"), Job(2, 4, 4, ("localhost", 29500))) == ("cpu",)
