"""`bench tpp --simulate` as users run it: tables, document, picture, timeline."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from liveavatar_engine.bench import command, plots, tpp
from liveavatar_engine.bench.plots import Piece
from liveavatar_engine.bench.results import Run
from liveavatar_engine.bench.schema import validate
from liveavatar_engine.pipeline.tpp.plan import StageCosts, make_plan
from liveavatar_engine.pipeline.tpp.trace import COMPUTE, DECODE, WAIT, Span, read_chrome_trace

SIMULATE = ("tpp", "--simulate", "--step-ms", "110", "--vae-ms", "60", "--devices", "5", "--blocks", "20")
SVG = "{http://www.w3.org/2000/svg}"


def document_of(folder: Path, *arguments: str) -> dict[str, Any]:
    assert command.main([*SIMULATE, *arguments, "--json", str(folder / "a.json")]) == 0
    document = json.loads((folder / "a.json").read_text())
    assert validate(document) == []
    return document


def figures(document: dict[str, Any]) -> dict[str, float]:
    (run,) = document["runs"]
    return {name: figure["value"] for name, figure in run["figures"].items()}


def run_of(document: dict[str, Any]) -> Run:
    (run,) = document["runs"]
    return Run("tpp", run["settings"], run["status"], rows=tuple(run["rows"]))


class TestResults:
    def test_the_papers_layout(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        document = document_of(tmp_path)
        (run,) = document["runs"]
        assert (run["suite"], run["status"]) == ("tpp", "simulated")
        found = figures(document)
        assert found["fps"] == pytest.approx(12 / 0.11)
        assert found["first_frame_s"] == pytest.approx(0.5)
        assert found["early_first_frame_s"] == pytest.approx(0.46)
        assert found["real_time_sessions"] == 4
        assert found["busy_4"] == pytest.approx(60 / 110)
        assert len(run["series"]["block_ms"]["values"]) == 19
        said = capsys.readouterr().out
        assert "nothing was measured" in said
        assert "step 110 ms (given)" in said
        assert "Measured on a CPU" not in said
        assert "rank 4 · decode · cuda:4" in said

    def test_machines_and_sessions(self, tmp_path: Path) -> None:
        apart = ("--nodes", "5", "--node-transfer-ms", "20", "--sink-update-after", "never", "--sessions", "2")
        document = document_of(tmp_path, *apart)
        assert figures(document)["early_first_frame_s"] > 0.46 + 4 * 0.02
        settings = document["runs"][0]["settings"]
        assert (settings["devices_per_node"], settings["node_transfer"]) == (1, 0.02)
        assert settings["sink_update_after"] is None
        assert {row["session"] for row in document["runs"][0]["rows"]} == {0, 1}

    def test_costs_that_were_measured(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        document = document_of(tmp_path)
        (run,) = document["runs"]
        figure = {"unit": "ms", "label": ""}
        steps = {**run, "suite": "step", "status": "measured", "figures": {"step_ms_p50": {"value": 80.0, **figure}}}
        (tmp_path / "b.json").write_text(json.dumps({**document, "runs": [steps]}))
        arguments = ("tpp", "--simulate", "--devices", "5", "--costs", str(tmp_path / "b.json"))
        assert command.main([*arguments, "--json", str(tmp_path / "c.json")]) == 0
        assert figures(json.loads((tmp_path / "c.json").read_text()))["bottleneck_ms"] == pytest.approx(80.0)
        said = capsys.readouterr().out
        assert "step 80 ms (measured on CPU" in said
        assert "decode 60 ms (the design's target, not measured here)" in said
        (tmp_path / "b.json").write_text(json.dumps({**document, "runs": [steps, steps]}))
        assert command.main([*arguments]) == 2
        assert "2 runs of the suite step, of a sweep" in capsys.readouterr().err

    def test_a_trace(self, tmp_path: Path) -> None:
        document = document_of(tmp_path, "--trace", str(tmp_path / "trace.json"))
        spans, labels = read_chrome_trace(tmp_path / "trace.json")
        assert len(spans) == len(document["runs"][0]["rows"])
        assert labels[2] == "rank 2 · step 2 · cuda:2"
        assert json.loads((tmp_path / "trace.json").read_text())["otherData"]["note"].startswith("simulated")


class TestPicture:
    def test_as_many_bars_as_spans(self, tmp_path: Path) -> None:
        run = run_of(document_of(tmp_path, "--html", str(tmp_path / "a.html")))
        last = max(row["end"] for row in run.rows if row["kind"] == DECODE and row["block"] < tpp._DRAWN_BLOCKS)
        work = [row for row in run.rows if row["kind"] in (COMPUTE, DECODE) and row["end"] <= last]
        begins = {rank: max(row["start"] for row in work if row["rank"] == rank) for rank in range(5)}
        gaps = [row for row in run.rows if row["kind"] == WAIT and row["end"] <= begins[row["rank"]]]
        assert len(work) > 5 * tpp._DRAWN_BLOCKS
        assert len(gaps) > tpp._DRAWN_BLOCKS
        page = ET.fromstring((tmp_path / "a.html").read_text().removeprefix("<!DOCTYPE html>\n"))
        (picture,) = (
            one for one in page.iter() if one.tag.endswith("figure") and "Figure 8" in "".join(one.itertext())
        )
        classes = [rect.attrib["class"] for rect in picture.iter(f"{SVG}rect")]
        assert len(classes) == len(work) + len(gaps)
        assert classes.count("prefill") == 4
        assert classes.count("bubble") == len(gaps)
        assert "simulated" in "".join(page.itertext())

    def test_spans_of_any_clock(self) -> None:
        plan = make_plan(["cuda:0", "cuda:1"], 1, StageCosts.of(1000, 500))
        spans = [
            *(Span(0, COMPUTE, 1e9 + block, 1e9 + block + 1, 0, block) for block in range(2)),
            *(Span(1, DECODE, 1e9 + block + 1, 1e9 + block + 1.5, 0, block) for block in range(2)),
            Span(1, WAIT, 1e9, 1e9 + 9, -1, -1, "records"),
        ]
        run = Run("tpp", {"blocks": 2}, rows=tpp.rows_of(spans, plan))
        assert [row["start"] for row in run.rows] == [0, 1, 1, 2, 0]
        classes = [rect.attrib["class"] for rect in ET.fromstring(f"<p>{tpp.timeline(run)}</p>").iter(f"{SVG}rect")]
        assert classes == ["turn0", "turn1", "turn0", "turn1", "bubble", "bubble"]

    def test_bars_lie_where_their_times_are(self) -> None:
        label = "rank 0 · step 0 · cuda:0"
        rows = {label: [Piece(0.0, 50.0, "turn0", "one & two", "0")], "b": [Piece(50.0, 100.0, "bubble", "gap")]}
        root = ET.fromstring(plots.timeline(rows, "ms", "time"))
        first, second = root.iter(f"{SVG}rect")
        assert float(first.attrib["x"]) + float(first.attrib["width"]) == pytest.approx(
            float(second.attrib["x"]), abs=0.02
        )
        assert first.attrib["width"] == second.attrib["width"]
        assert float(first.attrib["y"]) < float(second.attrib["y"])
        assert label in [text.text for text in root.iter(f"{SVG}text")], "whole"

    def test_lines_for_a_terminal(self, tmp_path: Path) -> None:
        run = run_of(document_of(tmp_path, "--sink-update-after", "1"))
        title, *lines = (str(line) for line in tpp.text_timeline(run))
        assert title.startswith("simulated: the first 16 blocks")
        assert len(lines) == 5
        cells = [line.rsplit(" ", 1)[1] for line in lines]
        assert {len(line) for line in cells} == {tpp._COLUMNS}
        assert cells[0].startswith("0000")
        assert "p1" in cells[0].replace("pp", "p")
        assert cells[4].startswith("·" * 15)
        assert "p" not in cells[4]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("tpp",), "the suite tpp needs --devices"),
        (("tpp", "--devices", "5"), "tpp needs --simulate"),
        (("tpp", "--simulate", "--devices", "6"), "Give 5 devices or max_sessions=2"),
        (("tpp", "--simulate", "--devices", "a,a"), "named more than once: a"),
        ((*SIMULATE, "--blocks", "0"), "blocks must be at least 1"),
        ((*SIMULATE, "--step-ms", "-1"), "cost of step: expected more than 0 seconds"),
        ((*SIMULATE, "--sessions", "0"), "max_sessions must be at least 1"),
        ((*SIMULATE, "--sink-update-after", "soon"), "--sink-update-after: expected blocks"),
        ((*SIMULATE, "--nodes", "2"), "--nodes 2: 5 devices cannot be shared evenly"),
        ((*SIMULATE, "--nodes", "5", "--devices-per-node", "1"), "give one of them"),
        ((*SIMULATE, "--sweep", "steps=2,4"), "--sweep: the suite tpp has its own options"),
        ((*SIMULATE, "--preset", "tiny"), "--preset: --simulate opens no model"),
        ((*SIMULATE, "--costs", "no.json"), "--costs no.json: "),
        ((*SIMULATE, "--trace", "no/a.json"), "the folder no does not exist"),
        (("step", "--devices", "5"), "--devices belongs to the suite tpp, not to step"),
        (("all", "--simulate"), "--simulate belongs to the suite tpp, not to all"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_one_clear_error(
    arguments: tuple[str, ...],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main([*arguments, "--json", "out.json"]) == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert said.err.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []
