"""The benchmark on a GPU: the paths that a CPU does not take. Speed is none of its business."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from liveavatar_engine.bench import command, work
from liveavatar_engine.bench.schema import validate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TINY = ("--preset", "tiny", "--device", "cuda", "--size", "128x64", "--blocks", "3", "--warmup", "1")


def measured(suite: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    out, page = folder / "out.json", folder / "out.html"
    assert command.main([suite, *TINY, *arguments, "--json", str(out), "--html", str(page)]) == 0
    document = json.loads(out.read_text())
    assert validate(document) == []
    assert document["environment"]["device_kind"] == "cuda"
    assert all(run["status"] == "measured" for run in document["runs"])
    return document["runs"]


def test_step_with_and_without_graphs(tmp_path: Path) -> None:
    for run in measured("step", tmp_path, "--sweep", "graphs=on,off"):
        figures = {name: figure["value"] for name, figure in run["figures"].items()}
        assert figures["host_ms_p50"] > 0
        assert figures["memory_mb"] > 0
        stages = {stage["name"]: stage["ms"] for stage in run["stages"]}
        assert {*work.LINEARS, work.RING_ATTENTION, work.RING_WRITE, work.NORMS} <= set(stages)
        assert 0 < sum(stages.values()) < 1000, "the head start of a layer is in no stage"


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="e4m3 needs sm_89 or newer"
)
def test_step_in_e4m3(tmp_path: Path) -> None:
    (run,) = measured("step", tmp_path, "--precision", "fp8", "--kv-precision", "fp8")
    assert work.QUANTISE in {stage["name"] for stage in run["stages"]}


@pytest.mark.parametrize("schedule", ["sequential", "diagonal"])
def test_stream(schedule: str, tmp_path: Path) -> None:
    (run,) = measured("stream", tmp_path, "--schedule", schedule)
    assert len(run["series"]["block_ms"]["values"]) == 3
    assert run["figures"]["ttff_s"]["value"] > 0


def test_vae(tmp_path: Path) -> None:
    (run,) = measured("vae", tmp_path)
    assert run["figures"]["decode_ms_p50"]["value"] > 0
