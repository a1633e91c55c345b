"""Pipelines in a torchrun job of several processes, all of which run the same script."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from compat.pipeline_calls import Files, LiveSource, reference_config

from liveavatar_engine.compat import BlockwiseWanS2V, TppWanS2V
from liveavatar_engine.compat.devices import pipeline_layout
from liveavatar_engine.errors import ConfigError

REFUSED = (
    "nobody.png",
    "infer_frames 80",
    "get_audio_callback is set on rank 0, but rank 2 gets the chunks",
    "rank 2: nobody there",
)
SCRIPT = Path(__file__).with_name("job_script.py")


@pytest.mark.slow
def test_one_rank_gets_what_is_made_and_its_callback_is_heard(
    tmp_path: Path, face: np.ndarray, checkpoint: Path
) -> None:
    files, out, root = Files(tmp_path, face), tmp_path / "out.pt", SCRIPT.parents[2]
    paths = os.pathsep.join(str(path) for path in (root, root / "kernels", root / "tests"))
    job = ("torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    inputs = (str(checkpoint), str(files.image), str(files.audio), str(out))
    ran = subprocess.run(
        [sys.executable, "-m", *job, str(SCRIPT), *inputs],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr
    made = torch.load(out, weights_only=True)
    refused, stages, counts, given = zip(*made["told"], strict=True)
    for messages in refused:
        for message, words in zip(messages, REFUSED, strict=True):
            assert words in message, "what one rank refuses, all do"
    assert stages == (["step 0", "step 1", "decode"], None, None)
    alone, _ = TppWanS2V(reference_config(), checkpoint).generate(**files.arguments(num_repeat=1))
    assert made["video"].equal(alone)
    assert counts == ([2, 5],) * 3, "where one stops, all do, and the next stream is whole"
    assert given == ([False] * 5, [False] * 5, [True] * 5)
    live = BlockwiseWanS2V(reference_config(), checkpoint)
    live.get_audio_callback = LiveSource(files.audio, 7680)
    for chunk, first, whole in zip_longest(live.generate(**files.arguments()), made["first"], made["whole"]):
        assert chunk.equal(whole)
        assert first is None or chunk.equal(first)


class _Ranks:
    rank, count = 0, 3


def test_a_job_of_too_few_processes() -> None:
    with pytest.raises(ConfigError, match="ask for 5 processes; the job has 3: start it with --nproc_per_node=5"):
        pipeline_layout(0, _Ranks(), 4, True)


def test_the_last_rank_that_is_asked_for_gets_the_video() -> None:
    assert pipeline_layout(0, _Ranks(), 2, True).receiver == 2
    assert pipeline_layout(0, _Ranks(), 2, False).receiver == 1
    assert pipeline_layout(0, _Ranks(), 1, False).devices == ("cpu:0", "cpu:1", "cpu:2")


def test_one_process_uses_the_gpus_that_are_asked_for_and_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pipeline_layout(0, None, 4, True).devices == ("cpu",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert pipeline_layout(0, None, 4, True).devices == tuple(f"cuda:{index}" for index in range(5))
    assert pipeline_layout(6, None, 4, True).devices == ("cuda:6", "cuda:7")
    assert pipeline_layout(0, None, 1, False).devices == ("cuda:0",)
