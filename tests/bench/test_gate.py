"""The gate: what is run, what is skipped, what is stopped, and what of it goes to the ledger."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import gate, ledger
from bench.gate import DONE, FAILED, NOT_RUN, OUT_OF_TIME, REFUSED, TESTS, Gate, Part, Subject
from liveavatar_engine.bench.environment import Environment
from liveavatar_engine.bench.results import Figure, Report, Run
from liveavatar_engine.bench.schema import validate
from liveavatar_engine.errors import InputError

H200 = Environment("bench", "abc", False, "NVIDIA H200", "cuda", [9, 0], 1, {"torch": "2"}, "2026-11-21T10:00:00Z")
SUBJECT = Subject(H200.as_dict(), "digest", "abc")
ON_CPU = replace(SUBJECT, environment={**H200.as_dict(), "device": "CPU", "device_kind": "cpu"})


HIDING = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = {"PIL", "av", "soxr", "ftfy", "sentencepiece", "hypothesis"}
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
sys.stderr.write("hiding\\n")
"""
"""A machine that has torch, triton, numpy, safetensors, transformers, rich and pytest only."""


def program(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def counted(folder: Path, name: str, text: str = "") -> tuple[str, ...]:
    """A program that leaves a mark for every time it ran."""
    return program(f"open({str(folder / 'ran')!r}, 'a').write({name!r} + ' ')\n{text}")


def suite(folder: Path, name: str = "step", complete: bool = True, **changes: Any) -> Part:
    """A part that writes a document with one figure."""
    report = Report(H200, None, None, (Run(name, {}, figures=(Figure("f", 1.0, "", ""),)),), complete)
    text = f"open({str(folder / (name + '.json'))!r}, 'w').write({report.as_json()!r})"
    return Part(name, counted(folder, name, text), 30.0, **changes)


def gpu_tests(folder: Path, code: int) -> Part:
    return Part(TESTS, counted(folder, TESTS, f"raise SystemExit({code})"), 30.0, needs_gpu=True, document=False)


def run(
    folder: Path, *parts: Part, subject: Subject = SUBJECT, again: bool = False, only: tuple[str, ...] = ()
) -> Gate:
    made = Gate(folder, subject, parts, Console(quiet=True))
    made.well = made.run(only, again)  # type: ignore[attr-defined]
    return made


def ran(folder: Path) -> list[str]:
    path = folder / "ran"
    return path.read_text().split() if path.exists() else []


def test_green_tests_let_figures_into_the_ledger(tmp_path: Path) -> None:
    made = run(tmp_path, gpu_tests(tmp_path, 0), suite(tmp_path))
    assert {name: one.status for name, one in made.outcomes.items()} == {TESTS: DONE, "step": DONE}
    assert made.outcomes["step"].recorded
    (row,) = ledger.read(tmp_path)
    assert (row["suite"], row["figures"]) == ("step", {"f": 1.0})


def test_red_tests_keep_figures_out_until_they_are_green(tmp_path: Path) -> None:
    made = run(tmp_path, gpu_tests(tmp_path, 1), suite(tmp_path))
    assert made.outcomes[TESTS].status == FAILED
    assert made.outcomes["step"].status == REFUSED
    assert "kept out of the ledger: the GPU tests are not green: failed" in (made.outcomes["step"].reason or "")
    assert list(tmp_path.glob("*.jsonl")) == []
    assert validate(json.loads((tmp_path / "step.json").read_text())) == [], "the figures are kept in the folder"
    state = json.loads((tmp_path / "gate.json").read_text())
    assert state["parts"]["step"]["status"] == REFUSED
    green = gpu_tests(tmp_path, 0)
    made = run(tmp_path, green, suite(tmp_path))
    assert made.outcomes["step"].status == DONE
    assert ran(tmp_path) == [TESTS, "step", TESTS], "the suite need not run again"
    assert len(ledger.read(tmp_path)) == 1


def test_without_tests_nothing_is_recorded(tmp_path: Path) -> None:
    parts = (gpu_tests(tmp_path, 0), suite(tmp_path))
    made = run(tmp_path, *parts, only=("step",))
    assert "the GPU tests of this code have not run" in (made.outcomes["step"].reason or "")
    run(tmp_path, *parts)
    assert len(ledger.read(tmp_path)) == 1
    changed = replace(SUBJECT, digest="another")
    made = run(tmp_path, *parts, subject=changed, only=("step",))
    assert made.outcomes["step"].status == REFUSED, "the tests that passed are those of other code"
    assert len(ledger.read(tmp_path)) == 1


def test_figures_of_an_unknown_commit_are_refused(tmp_path: Path) -> None:
    made = run(tmp_path, gpu_tests(tmp_path, 0), suite(tmp_path), subject=replace(SUBJECT, commit="unknown"))
    assert "the commit is not known: give --commit" in (made.outcomes["step"].reason or "")


def test_what_has_finished_is_not_run_again(tmp_path: Path) -> None:
    parts = (gpu_tests(tmp_path, 0), suite(tmp_path), suite(tmp_path, "vae"))
    run(tmp_path, *parts)
    run(tmp_path, *parts)
    assert ran(tmp_path) == [TESTS, "step", "vae"]
    run(tmp_path, *parts, again=True)
    assert ran(tmp_path) == [TESTS, "step", "vae"] * 2
    run(tmp_path, *parts, subject=replace(SUBJECT, digest="another"))
    assert ran(tmp_path) == [TESTS, "step", "vae"] * 3
    run(tmp_path, *parts, again=True, only=("vae",))
    assert ran(tmp_path)[9:] == ["vae"]


def test_a_part_that_fails_leaves_the_others_and_is_run_again(tmp_path: Path) -> None:
    broken = Part("build", counted(tmp_path, "build", "print('reason'); raise SystemExit(3)"), 30.0, document=False)
    made = run(tmp_path, broken, gpu_tests(tmp_path, 0), suite(tmp_path))
    assert made.outcomes["build"].reason == "exit code 3, see build.log"
    assert (tmp_path / "build.log").read_text() == "reason\n"
    assert made.outcomes["step"].status == DONE
    assert not made.well  # type: ignore[attr-defined]
    run(tmp_path, broken, gpu_tests(tmp_path, 0), suite(tmp_path))
    assert ran(tmp_path) == ["build", TESTS, "step", "build"]


def test_what_takes_too_long_is_stopped_and_says_so(tmp_path: Path) -> None:
    text = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    slow = Part("step", program(f"{text}print('half', flush=True)\ntime.sleep(60)"), 1.5)
    made = run(tmp_path, slow, suite(tmp_path, "vae"))
    assert made.outcomes["step"].status == OUT_OF_TIME
    assert made.outcomes["step"].reason == "stopped after 2 s, see step.log"
    assert made.outcomes["step"].seconds < 10
    assert "half" in (tmp_path / "step.log").read_text()
    assert made.outcomes["vae"].status == REFUSED


def test_the_whole_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TOTAL_SECONDS", 0.0)
    made = run(tmp_path, suite(tmp_path))
    assert made.outcomes["step"].reason == "all of the 0 s were gone"
    assert ran(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("pass", "wrote no step.json"), ("open('{0}', 'w').write('{{}}')", "step.json: document: lacks schema")],
)
def test_a_part_must_write_a_right_document(text: str, complaint: str, tmp_path: Path) -> None:
    made = run(tmp_path, Part("step", program(text.format(tmp_path / "step.json")), 30.0))
    assert (made.outcomes["step"].status, made.outcomes["step"].reason) == (FAILED, complaint)


def test_a_dry_run_has_a_ledger_of_its_own(tmp_path: Path) -> None:
    report = Report(replace(H200, device_kind="cpu"), None, None, (Run("step", {}),))
    text = f"open({str(tmp_path / 'step.json')!r}, 'w').write({report.as_json()!r})"
    made = run(tmp_path, gpu_tests(tmp_path, 1), Part("step", program(text), 30.0), subject=ON_CPU)
    assert made.outcomes[TESTS].status == NOT_RUN
    assert made.outcomes[TESTS].reason == "skipped: no GPU"
    assert ran(tmp_path) == []
    assert made.outcomes["step"].status == DONE
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["dry-run.jsonl"]
    assert made.well  # type: ignore[attr-defined]


def test_a_state_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "gate.json").write_text("{}")
    with pytest.raises(InputError, match="gate.json: not the state of a gate; remove it"):
        run(tmp_path, suite(tmp_path))


class TestCommand:
    def test_on_a_gpu_the_limits_fit_into_nine_minutes(self, tmp_path: Path) -> None:
        parts = self.parts(tmp_path, on_gpu=True)
        assert [part.name for part in parts] == ["build", TESTS, "kernels", "step", "vae", "stream"]
        assert gate.TOTAL_SECONDS < 9 * 60 - 5
        assert sum(part.seconds for part in parts) <= gate.TOTAL_SECONDS
        step = " ".join(parts[3].command)
        assert "--preset 14b" in step
        assert "--precision fp8" in step
        assert "kv_precision=bf16,fp8" in step
        assert f"--json {tmp_path}/step.json" in step
        assert "--commit abc" in step

    def test_keys_do_not_depend_on_the_folder(self, tmp_path: Path) -> None:
        here, there = (self.parts(tmp_path / name, on_gpu=True)[3] for name in ("a", "b"))
        assert here.command != there.command
        assert SUBJECT.key(here, tmp_path / "a") == SUBJECT.key(there, tmp_path / "b")
        assert SUBJECT.key(here, tmp_path / "a") != ON_CPU.key(here, tmp_path / "a")

    @staticmethod
    def parts(folder: Path, on_gpu: bool) -> list[Part]:
        options = gate._parser().parse_args(["--commit", "abc", "--results", str(folder)])
        return gate.parts_of(options, folder, on_gpu)

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--only", "speed", "--device", "cpu"], "--only: no part 'speed'; there are build"),
            (["--device", "tpu"], "device 'tpu': expected auto"),
        ],
        ids=["part", "device"],
    )
    def test_mistakes(
        self, arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert gate.main([*arguments, "--results", str(tmp_path)]) == 2
        assert complaint in capsys.readouterr().err

    def test_dry_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """The real thing as far as a CPU goes: one suite in a process of its own, where no other package is."""
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(HIDING)
        monkeypatch.setenv("PYTHONPATH", str(site))
        arguments = ["--preset", "tiny", "--device", "cpu", "--results", str(tmp_path), "--only", "kernels", "stream"]
        assert gate.main(arguments) == 0
        said = capsys.readouterr().out
        assert "kernels: not run: skipped: no GPU" in said
        assert "stream: done" in said
        assert validate(json.loads((tmp_path / "stream.json").read_text())) == []
        assert (tmp_path / "stream.html").read_text().startswith("<!DOCTYPE html>")
        log = (tmp_path / "stream.log").read_text()
        assert log.startswith("hiding")
        assert "time to first frame" in log
        (row,) = ledger.read_file(tmp_path / "dry-run.jsonl")
        assert (row["suite"], row["settings"]["preset"]) == ("stream", "tiny")


def test_the_digest_follows_the_sources(tmp_path: Path) -> None:
    source = tmp_path / "bench" / "a.py"
    source.parent.mkdir()
    source.write_text("1")
    before = gate.source_digest(tmp_path)
    (source.parent / "results").mkdir()
    (source.parent / "results" / "step.json").write_text("{}")
    assert gate.source_digest(tmp_path) == before, "results are no sources"
    source.write_text("2")
    assert gate.source_digest(tmp_path) != before
