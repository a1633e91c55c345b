"""`bench tpp --simulate` as users run it: tables, document, picture, timeline."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from liveavatar_engine.bench import command, plots
from liveavatar_engine.bench.plots import Piece
from liveavatar_engine.bench.results import Run
from liveavatar_engine.bench.schema import validate
from liveavatar_engine.bench.tpp import picture
from liveavatar_engine.pipeline.tpp.plan import StageCosts, make_plan
from liveavatar_engine.pipeline.tpp.trace import COMPUTE, DECODE, WAIT, Span, read_chrome_trace

SIMULATE = ("tpp", "--simulate", "--step-ms", "110", "--vae-ms", "60", "--devices", "5", "--blocks", "20")
SVG = "{http://www.w3.org/2000/svg}"


def document_of(folder: Path, *arguments: str) -> dict[str, Any]:
    return document_at(folder, *SIMULATE, *arguments)


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
        last = max(row["end"] for row in run.rows if row["kind"] == DECODE and row["block"] < picture._DRAWN_BLOCKS)
        work = [row for row in run.rows if row["kind"] in (COMPUTE, DECODE) and row["end"] <= last]
        begins = {rank: max(row["start"] for row in work if row["rank"] == rank) for rank in range(5)}
        gaps = [row for row in run.rows if row["kind"] == WAIT and row["end"] <= begins[row["rank"]]]
        assert len(work) > 5 * picture._DRAWN_BLOCKS
        assert len(gaps) > picture._DRAWN_BLOCKS
        page = ET.fromstring((tmp_path / "a.html").read_text().removeprefix("<!DOCTYPE html>\n"))
        (drawn,) = (one for one in page.iter() if one.tag.endswith("figure") and "Figure 8" in "".join(one.itertext()))
        classes = [rect.attrib["class"] for rect in drawn.iter(f"{SVG}rect")]
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
        run = Run("tpp", {"blocks": 2}, rows=picture.rows_of(spans, plan))
        assert [row["start"] for row in run.rows] == [0, 1, 1, 2, 0]
        classes = [rect.attrib["class"] for rect in ET.fromstring(f"<p>{picture.timeline(run)}</p>").iter(f"{SVG}rect")]
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
        title, *lines = (str(line) for line in picture.text_timeline(run))
        assert title.startswith("simulated: the first 16 blocks")
        assert len(lines) == 5
        cells = [line.rsplit(" ", 1)[1] for line in lines]
        assert {len(line) for line in cells} == {picture._COLUMNS}
        assert cells[0].startswith("0000")
        assert "p1" in cells[0].replace("pp", "p")
        assert cells[4].startswith("·" * 15)
        assert "p" not in cells[4]


SMALL = ("--size", "64x64", "--blocks", "3", "--warmup", "2")


class TestRuns:
    """Real processes; what is checked is what is said of them, not how fast they are."""

    def test_sleeping_stages(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        costs = ("--step-ms", "10", "--vae-ms", "30", "--sink-update-after", "1")
        (run,) = document_at(tmp_path, "tpp", "--sleep", "--devices", "2", *costs, *SMALL)["runs"]
        found = {name: figure["value"] for name, figure in run["figures"].items()}
        assert (run["status"], run["settings"]["mode"]) == ("measured", "sleeping stages")
        assert "preset" not in run["settings"]
        assert found["step_ms"] >= 10
        assert found["decode_ms"] >= 30
        intervals = run["series"]["block_ms"]["values"]
        assert found["fps"] == pytest.approx(12e3 * len(intervals) / sum(intervals))
        assert found["first_frame_s"] > found["first_block_s"] > 0.07
        assert found["predicted_fps"] == pytest.approx(12e3 / (found["predicted_block_ms_p50"]))
        assert len(run["series"]["block_ms"]["values"]) == 3
        assert {row["name"] for row in run["rows"]} >= {"denoise", "decode"}  # a prefill only where a rank was idle
        assert {row["rank"] for row in run["rows"]} == {0, 1}
        said = capsys.readouterr().out
        assert "sleeping stages: the first" in said
        assert "simulated with the stage times that were measured" in said
        assert "stages sleep in processes of their own" in said

    def test_workers_with_random_weights(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        trace = str(tmp_path / "trace.json")
        some = ("--devices", "cpu:0,cpu:1", "--preset", "tiny", "--sessions", "2", "--trace", trace)
        (run,) = document_at(tmp_path, "tpp", *some, *SMALL, "--html", str(tmp_path / "a.html"))["runs"]
        assert (run["status"], run["settings"]["preset"], run["settings"]["mode"]) == ("measured", "tiny", "measured")
        assert {row["session"] for row in run["rows"] if row["kind"] == COMPUTE} == {0, 1}
        assert sum(row["kind"] == DECODE for row in run["rows"]) == 2 * 5
        assert len(read_chrome_trace(trace)[0]) == len(run["rows"])
        assert len(run["series"]["block_ms"]["values"]) == 2 * 3
        assert "no text encoder runs" in capsys.readouterr().out
        page = "".join(ET.fromstring((tmp_path / "a.html").read_text().removeprefix("<!DOCTYPE html>\n")).itertext())
        assert "Figure 8" in page
        assert "difference" in page

    def test_one_device_and_what_more_would_do(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (run,) = document_at(tmp_path, "tpp", "--device", "cpu", "--preset", "tiny", *SMALL)["runs"]
        assert (run["status"], run["settings"]["mode"]) == ("measured", "stages in turn")
        assert [(row["devices"], row["sessions"], row["status"]) for row in run["rows"]] == [
            *((count, 1, "simulated") for count in range(1, 6)),
            (6, 2, "simulated"),
        ]
        found = {name: figure for name, figure in run["figures"].items()}
        block = 4 * found["step_ms"]["value"] + found["decode_ms"]["value"]
        assert found["simulated_fps_1"]["value"] < 12e3 / block * 1.001
        assert found["simulated_first_frame_s_1"]["value"] == pytest.approx(block / 1e3)
        assert found["first_decode_ms"]["value"] < found["decode_ms"]["value"]
        for name, figure in found.items():
            assert figure["label"].startswith("simulated" if name.startswith("simulated") else "measured")
        said = capsys.readouterr().out
        assert "Simulated from the stage times measured here" in said
        assert "no pipeline has run" in said


def document_at(folder: Path, *arguments: str) -> dict[str, Any]:
    assert command.main([*arguments, "--json", str(folder / "a.json")]) == 0
    document = json.loads((folder / "a.json").read_text())
    assert validate(document) == []
    return document


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("tpp", "--simulate"), "tpp --simulate needs --devices"),
        (("tpp", "--sleep"), "tpp --sleep needs --devices"),
        (("tpp", "--devices", "cuda:70,cuda:71"), "device 'cuda:70': this machine has"),
        (("tpp", "--devices", "cpu:0,cpu:0"), "a device is named twice"),
        (("tpp", "--devices", "cpu:0,cpu:1", "--device", "cpu"), "--device: the suite tpp takes --devices"),
        (("tpp", "--devices", "cpu:0,cpu:1", "--paced"), "--paced needs --simulate"),
        (("tpp", "--devices", "cpu:0,cpu:1", "--transfer-ms", "1"), "--transfer-ms: transfers are measured"),
        (("tpp", "--device", "cpu", "--step-ms", "1"), "--step-ms: on one device stages are measured"),
        (("tpp", "--device", "cpu", "--trace", "a.json"), "--trace: one device has no timeline"),
        (("tpp", "--sleep", "--devices", "cuda:0,cuda:1"), "--sleep uses no GPU"),
        (("tpp", "--sleep", "--simulate", "--devices", "2"), "give one of them"),
        (("tpp", "--sleep", "--devices", "2", "--preset", "tiny"), "--preset: --sleep opens no model"),
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
