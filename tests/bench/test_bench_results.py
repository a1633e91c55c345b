"""Statistics, and the JSON document's shape."""

import dataclasses
import json
import math
from typing import Any

import pytest

from liveavatar_engine.bench.environment import Environment
from liveavatar_engine.bench.kernels.timing import Ceilings
from liveavatar_engine.bench.labels import labels
from liveavatar_engine.bench.results import FAILED, Figure, Report, Run, Series, Stage, percentile
from liveavatar_engine.bench.schema import validate

CPU = Environment("bench step", "abc", True, "CPU", "cpu", None, 8 << 30, {"torch": "2.11", "cuda": None}, "2026-11-21")


def report() -> Report:
    run = Run(
        "step",
        {"size": "64x64", "steps": 4},
        seconds=1.5,
        warm_up="5 blocks",
        figures=(Figure("step_ms_p50", 2.5, "ms", "a step"), Figure("host_ms_p50", None, "ms", "host")),
        series=(Series("block_ms", "ms", "a block", (1.0, 2.0, 500.0), 480.0),),
        stages=(Stage("qkv", 1.0, 3.0, flops=1e9), Stage("audio", 1.0, 3.0, per_block=True)),
        rows=({"anything": 1},),
        notes=("a note",),
    )
    return Report(CPU, Ceilings(10.0, 0.1, None, "fp32"), None, (run, Run("vae", {}, FAILED, "why")))


class TestStatistics:
    def test_percentiles_of_known_data(self) -> None:
        values = [float(value) for value in range(101)]
        assert (percentile(values, 50), percentile(values, 99)) == (50.0, 99.0)
        assert percentile([1.0, 2.0], 50) == 1.5
        assert percentile([1.0, 2.0, 3.0, 10.0], 99) == pytest.approx(3.0 + 0.97 * 7.0)
        assert math.isnan(percentile([], 50))

    def test_a_series_counts_what_is_late(self) -> None:
        found = Series("block_ms", "ms", "", (480.0, 480.1, 100.0, 900.0), 480.0)
        assert (found.p50, found.misses) == (pytest.approx(480.05), 2)
        assert dataclasses.replace(found, deadline=None).misses == 0

    def test_figures_by_name(self) -> None:
        run = report().runs[0]
        assert run.figure("step_ms_p50") == 2.5
        assert run.figure("host_ms_p50") is None
        assert run.figure("nothing") is None


class TestDocument:
    def test_a_document_is_valid_and_complete(self) -> None:
        found = json.loads(report().as_json())
        assert validate(found) == []
        run = found["runs"][0]
        assert run["figures"]["step_ms_p50"] == {"value": 2.5, "unit": "ms", "label": "a step"}
        assert run["series"]["block_ms"]["values"] == [1.0, 2.0, 500.0]
        assert run["series"]["block_ms"]["p50"] == 2.0
        assert run["stages"][1]["per_block"] is True
        assert (found["schema"], found["version"], found["complete"]) == ("liveavatar_engine.bench", 1, True)
        assert found["ceilings"]["dtype"] == "fp32"

    def test_infinity_is_no_figure(self) -> None:
        broken = dataclasses.replace(report(), runs=(Run("x", {}, figures=(Figure("f", math.inf, "", ""),)),))
        with pytest.raises(ValueError, match="JSON compliant"):
            broken.as_json()

    @pytest.mark.parametrize(
        ("path", "value", "complaint"),
        [
            (("version",), 2, "document.version: expected 1, not 2"),
            (("complete",), 1, "document.complete: expected bool"),
            (("environment", "device_kind"), "tpu", "expected 'cuda' or 'cpu'"),
            (("environment", "commit"), None, "document.environment.commit: expected str"),
            (("runs", 0, "status"), "fine", "document.runs[0].status"),
            (("runs", 0, "reason"), "why", "a run that was measured has none"),
            (("runs", 1, "reason"), None, "missing, the run was failed"),
            (("runs", 0, "figures", "step_ms_p50", "value"), "2", "step_ms_p50.value: expected int or float or null"),
            (("runs", 0, "series", "block_ms", "values", 1), True, "block_ms.values[1]"),
            (("runs", 0, "series", "block_ms", "values"), {}, "expected a list"),
            (("runs", 0, "extra"), 1, "document.runs[0]: knows no extra"),
            (("ceilings", "dtype"), 3, "document.ceilings.dtype"),
        ],
        ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
    )
    def test_what_is_wrong_is_named(self, path: tuple[Any, ...], value: Any, complaint: str) -> None:
        document = json.loads(report().as_json())
        place = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        complaints = validate(document)
        assert len(complaints) == 1
        assert complaint in complaints[0]

    def test_missing_fields_are_named(self) -> None:
        document = json.loads(report().as_json())
        del document["runs"][0]["stages"]
        assert validate(document) == ["document.runs[0]: lacks stages"]
        assert validate([]) == ["document: expected an object, not []"]


def test_runs_are_named_by_what_differs() -> None:
    base = {"preset": "tiny", "size": "64x64", "precision": "fp8", "kv_precision": "bf16", "steps": 4, "graphs": True}

    def named(*changes: dict[str, Any]) -> list[str]:
        return labels([Run("step", {**base, **change}) for change in changes])

    assert named({}) == ["tiny, 64x64, fp8"]
    assert named({}, {"size": "128x64"}) == ["64x64", "128x64"]
    assert named({}, {"steps": 2, "graphs": False}) == ["4 steps, graphs on", "2 steps, graphs off"]
    assert named({}, {"kv_precision": "fp8"}) == ["kv bf16", "kv fp8"]
    assert labels([Run("kernels", {})]) == ["all"]
