"""The benchmark as users run it, on a CPU with the tiny preset."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from support import OWN_GOLDEN

from liveavatar_engine.bench import command, runner, stream, work
from liveavatar_engine.bench.results import Run
from liveavatar_engine.bench.schema import validate
from liveavatar_engine.bench.settings import Settings
from liveavatar_engine.bench.stages import ONCE_PER_BLOCK
from liveavatar_engine.vae.vae import Vae

TINY = ("--preset", "tiny", "--device", "cpu", "--size", "64x64", "--blocks", "2", "--warmup", "1")

Document = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `all` leaves: all.json, all.html, and the exit code in all.code."""
    folder = tmp_path_factory.mktemp("all")
    files = ("--json", str(folder / "all.json"), "--html", str(folder / "all.html"))
    (folder / "all.code").write_text(str(command.main(["all", *TINY, *files])))
    return folder


@pytest.fixture(scope="module")
def document(folder: Path) -> Document:
    return json.loads((folder / "all.json").read_text())


def run_of(document: Document, suite: str) -> Document:
    (run,) = (run for run in document["runs"] if run["suite"] == suite)
    return run


def figures(document: Document, suite: str) -> dict[str, float | None]:
    return {name: figure["value"] for name, figure in run_of(document, suite)["figures"].items()}


class TestAll:
    def test_ends_well_and_says_everything(self, folder: Path, document: Document) -> None:
        assert (folder / "all.code").read_text() == "0"
        assert validate(document) == []
        assert document["complete"]
        assert [run["suite"] for run in document["runs"]] == list(runner.SUITES)
        assert document["environment"]["device_kind"] == "cpu"
        assert document["limits"] is None
        assert document["ceilings"]["dtype"] == "fp32"

    def test_kernels_are_not_run_without_a_gpu(self, document: Document) -> None:
        run = run_of(document, "kernels")
        assert (run["status"], run["figures"]) == ("not run", {})
        assert "needs a CUDA device" in run["reason"]

    def test_step(self, document: Document) -> None:
        run, found = run_of(document, "step"), figures(document, "step")
        assert len(run["series"]["block_ms"]["values"]) == 2
        assert len(run["series"]["step_ms"]["values"]) == 2 * 3, "a block's first step has the block's own work in it"
        assert run["series"]["block_ms"]["deadline"] == 480.0
        assert found["step_ms_p50"] == run["series"]["step_ms"]["p50"]
        assert found["block_ms_p50"] > 3 * min(run["series"]["step_ms"]["values"])
        assert found["host_ms_p50"] is None, "on a CPU, taking a block is computing it"
        assert 0 < found["struct_ms_p50"] < 50
        assert found["memory_mb"] > 50

    def test_every_stage_of_a_step_is_found(self, document: Document) -> None:
        stages = {stage["name"]: stage for stage in run_of(document, "step")["stages"]}
        assert set(stages) == {*work.STEP_STAGES, work.REMAINDER, ONCE_PER_BLOCK} - {work.QUANTISE}
        layers, injectors = 3, 2
        assert stages[work.RING_WRITE]["calls"] == stages[work.RING_ATTENTION]["calls"] == layers
        assert stages[work.QKV]["calls"] == 3 * layers
        for name in (work.ATTENTION_OUTPUT, work.CROSS_QUERY, work.CROSS_OUTPUT, work.FFN_DOWN):
            assert stages[name]["calls"] == layers, name
        assert stages[work.NORMS]["calls"] == 3 * layers + 1, "the injectors' norms are not among them"
        assert stages[work.AUDIO_INJECTION]["calls"] == 4 * injectors, "norm, q, attention, o"
        assert stages[ONCE_PER_BLOCK]["per_block"]
        assert all(stage["measured"] > 0 for stage in stages.values() if stage["flops"] or stage["bytes"])
        assert all(stage["datasheet"] is None for stage in stages.values())
        assert stages[work.REMAINDER]["ms"] < 0.5 * sum(stage["ms"] for stage in stages.values())

    def test_vae(self, document: Document) -> None:
        found = figures(document, "vae")
        assert len(run_of(document, "vae")["series"]["decode_ms"]["values"]) == 2
        assert found["decode_fps"] == pytest.approx(12 / found["decode_ms_p50"] * 1e3)
        assert found["decode_real_time"] == pytest.approx(found["decode_fps"] / 25)
        assert found["decode_datasheet"] is None
        assert found["encode_ms"] > 0
        assert found["priming_ms"] > 0

    def test_stream(self, document: Document) -> None:
        run, found = run_of(document, "stream"), figures(document, "stream")
        assert len(run["series"]["block_ms"]["values"]) == 2
        assert found["ttff_s"] == pytest.approx(found["ttff_wait_s"] + found["ttff_denoise_s"] + found["ttff_decode_s"])
        assert found["ttff_wait_s"] >= 0.02, "half a frame at 25 frames/s, or more where fewer are made"
        assert found["audio_wait_s"] == pytest.approx(0.48 + 0.16)
        assert found["first_frame_cold_s"] > found["opening_s"] > 0
        assert found["fps"] < found["steady_fps"], "the former has the opening in it"
        assert found["real_time_factor"] == pytest.approx(found["steady_fps"] / 25)
        late = sum(value > 480 for value in run["series"]["block_ms"]["values"])
        assert found["deadline_misses"] == late
        assert set(run["series"]) == {"block_ms", "audio_ms", "denoise_ms", "decode_ms"}

    def test_ablation(self, document: Document) -> None:
        rows = {row["key"]: row for row in run_of(document, "ablation")["rows"]}
        for key in ("sequential", "clean", "diagonal"):
            assert rows[key]["reason"] is None
            assert rows[key]["fps"] > 0
        for key in ("sequence_parallel", "tpp_4", "tpp_5"):
            assert rows[key]["reason"].startswith("not available: ")
            assert (rows[key]["fps"], rows[key]["ttff_s"], rows[key]["memory_mb"]) == (None, None, None)
            assert f"{key}_fps" not in figures(document, "ablation")
        assert "device 'cuda:0': this machine has 0 CUDA devices" in rows["tpp_5"]["reason"]
        assert (rows["clean"]["evaluations"], rows["sequential"]["evaluations"]) == (5, 4)
        assert rows["tpp_5"]["paper"]["optimised_fps"] == 45.2
        assert rows["diagonal"]["paper"] is None

    def test_the_page_is_well_formed_and_whole(self, folder: Path) -> None:
        text = (folder / "all.html").read_text()
        page = ET.fromstring(text.split("\n", 1)[1])
        assert not [tag for tag in ("script", "link", "img", "iframe") if f"<{tag}" in text]
        assert [url for url in text.split('"') if url.startswith("http")].count("http://www.w3.org/2000/svg") > 0
        assert {url for url in text.split('"') if "://" in url} <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xhtml",
        }
        said = " ".join(page.itertext())
        for words in ("Measured on a CPU", "Where a step's time goes", "ring attention", "deadline: 480 ms", "p99: "):
            assert words in said
        assert "needs a CUDA device" in said
        assert "prefers-color-scheme: dark" in text
        assert len(page.findall(".//{http://www.w3.org/2000/svg}svg")) == 6, "stages, blocks four times, ablation"


class TestSweep:
    def test_points_stand_side_by_side(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out, page = tmp_path / "sweep.json", tmp_path / "sweep.html"
        sweep = ("--sweep", "kv_precision=auto,fp8", "precision=fp8", "--json", str(out), "--html", str(page))
        assert command.main(["step", *TINY, "--blocks", "1", "--warmup", "0", *sweep]) == 0
        found = json.loads(out.read_text())
        assert validate(found) == []
        assert [run["settings"]["kv_precision"] for run in found["runs"]] == ["auto", "fp8"]
        assert {run["settings"]["precision"] for run in found["runs"]} == {"fp8"}
        assert all(any(stage["name"] == work.QUANTISE for stage in run["stages"]) for run in found["runs"])
        said = capsys.readouterr().out
        assert "kv auto" in said
        assert "kv fp8" in said
        assert "Sweep: a denoise step, median" in page.read_text()

    def test_one_point_that_fails_leaves_the_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fails_at_64x64(settings: Settings, bench: Any) -> Run:
            if settings.size == "64x64":
                raise RuntimeError("no luck\nat all")
            return Run("vae", settings.as_dict())

        monkeypatch.setitem(runner._BY_POINT, "vae", fails_at_64x64)
        out = tmp_path / "out.json"
        assert command.main(["vae", *TINY, "--sweep", "size=64x64,80x64", "--json", str(out)]) == 1
        found = json.loads(out.read_text())
        assert [(run["status"], run["reason"]) for run in found["runs"]] == [
            ("failed", "RuntimeError: no luck"),
            ("measured", None),
        ]
        assert validate(found) == []
        assert "vae, 64x64: failed: RuntimeError: no luck" in capsys.readouterr().out


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["step", "--device", "tpu"], "device 'tpu': expected auto, cpu, cuda or cuda:N"),
            (["step", "--device", "cuda:7"], "this machine has 0 CUDA devices"),
            (["step", "--size", "large"], "size 'large': expected W*H"),
            (["step", "--size", "32x32"], "sides must be 64 to 4096"),
            (["step", "--sweep", "size"], "--sweep: expected KEY=VALUE"),
            (["step", "--sweep", "preset=tiny", "--preset", "tiny"], "does not go with --preset or --checkpoint"),
            (["step", "--lora", "a.safetensors"], "--lora needs --checkpoint"),
            (["step", "--checkpoint", "nowhere"], "nowhere/config.json: no such file"),
            (["step", "--motion-tokens", "off", "--blocks", "0"], "blocks must be at least 1"),
            (["step", "--op", "ring_write"], "--op belongs to the suite kernels, not to step"),
            (["step", "--json", "no/where.json"], "the folder no does not exist; create it first"),
            (["step", "--html", "."], "it is a directory"),
            (["compare"], "compare needs --reference DIR"),
            (["step", "--reference", "x"], "--reference belongs to the suite compare, not to step"),
            (["stream", "--schedule", "diagonal", "--kv-mode", "clean"], "schedule 'diagonal' needs kv_mode"),
            (["stream", "--preset", "14b", "--size", "4096x4096", "--device", "cpu"], "of memory, "),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_one_clear_error(
        self,
        arguments: list[str],
        complaint: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert command.main([*arguments, *(() if "--json" in arguments else ("--json", "out.json"))]) == 2
        said = capsys.readouterr()
        assert complaint in said.err
        assert said.err.count("error: ") == 1
        assert said.out == ""
        assert list(tmp_path.iterdir()) == []

    def test_an_unknown_suite(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            command.main(["speed"])
        assert stopped.value.code == 2
        assert "invalid choice: 'speed'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "code", "said"),
        [(KeyboardInterrupt(), 130, "interrupted"), (torch.OutOfMemoryError("no room"), 2, "error: no room")],
        ids=["Ctrl-C", "memory"],
    )
    def test_what_stops_a_run_leaves_nothing(
        self,
        error: BaseException,
        code: int,
        said: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def stops(*_: Any) -> None:
            raise error

        monkeypatch.setitem(runner._BY_POINT, "stream", stops)
        files = ("--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html"))
        assert command.main(["stream", *TINY, *files]) == code
        assert said in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_instead_of_random_weights(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    checkpoint = ("--checkpoint", str(OWN_GOLDEN / "checkpoint"), "--device", "cpu", "--size", "64x64")
    assert command.main(["step", *checkpoint, "--blocks", "1", "--warmup", "0", "--json", str(out)]) == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert (run["settings"]["preset"], run["status"]) == (None, "measured")


def test_blocks_that_overlap_take_all_their_calls() -> None:
    """The figures of a stream whose chunks came at known times."""
    geometry = Settings("tiny", None, None, "cpu", "64x64").geometry()
    found = stream.Measured(geometry, opening=1.0, warm_up=1, blocks_under_way=4)
    for arrival in (1.5, 2.0, 2.4, 3.0):
        found.arrivals.append(arrival)
        found.frames.append(12)
        found.timings.append({"denoise": 0.1, "decode": 0.05})
    assert found.fps == pytest.approx(48 / 3.0)
    assert found.block_seconds == pytest.approx([0.5, 0.4, 0.6])
    assert found.steady_fps == pytest.approx(36 / 1.5)
    assert found.frame_wait == pytest.approx(0.5 / 24)
    assert found.ttff == pytest.approx(0.5 / 24 + 4 * 0.1 + 0.05)
    assert found.audio_wait == pytest.approx(4 * 0.48 + 0.16)


def test_the_first_frame_is_cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engine keeps what it encoded of a picture: the measured session must not find its own."""
    encoded = []
    encode = Vae.encode_still
    monkeypatch.setattr(Vae, "encode_still", lambda *arguments: encoded.append(1) or encode(*arguments))
    assert command.main(["stream", *TINY, "--blocks", "1", "--warmup", "0", "--json", str(tmp_path / "a.json")]) == 0
    assert len(encoded) == 2, "the warm-up's picture and the measured one"
