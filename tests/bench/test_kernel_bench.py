"""What the kernel suite makes of its measurements: rows, targets, choices, tables, and the command."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from liveavatar_kernels.fp8_linear import OP as FP8_LINEAR_OP
from liveavatar_kernels.fp8_linear import choices
from liveavatar_kernels.model_sizes import WAN_14B
from rich.console import Console

from liveavatar_engine.bench import bench, command
from liveavatar_engine.bench.environment import Environment
from liveavatar_engine.bench.kernels import choose, report, rows, subjects, suite, targets
from liveavatar_engine.bench.kernels.rows import Limits, Row, failures, fastest, limits_of, timed, with_ratios
from liveavatar_engine.bench.kernels.runner import Conditions
from liveavatar_engine.bench.kernels.subjects import SUBJECTS, Subject
from liveavatar_engine.bench.kernels.timing import Ceilings, Summary
from liveavatar_engine.bench.schema import validate
from liveavatar_engine.errors import OutputError
from liveavatar_engine.files import check_writable, write_atomically

DENSE = subjects.RING_ATTENTION.cases[0]
E4M3 = next(case for case in subjects.RING_ATTENTION.cases if case.quantized)


def row(case: str = "one", implementation: str = "triton", us: float | None = 10.0, **changes: Any) -> Row:
    status = rows.MEASURED if us is not None else rows.ABSENT
    return Row("op", case, implementation, "bf16", status, us=us, **changes)


class TestRows:
    def test_numbers_follow_from_time(self) -> None:
        blank = row(us=None, flops=2_000_000, bytes=1_000_000)
        found = timed(blank, Summary(10.0, 9.0, 12.0), Limits(1.0, 2.0, 500.0), Ceilings(200.0, 1.0))
        assert (found.us, found.us_p10, found.us_p90) == (10.0, 9.0, 12.0)
        assert (found.tflops, found.gbps) == (pytest.approx(0.2), pytest.approx(100.0))
        assert found.compute_share == pytest.approx(0.2)
        assert found.memory_share == pytest.approx(0.2)
        assert found.copy_share == pytest.approx(0.5)
        in_e4m3 = timed(dataclasses.replace(blank, dtype="e4m3"), Summary(10.0, 9.0, 12.0), Limits(1, 2, 500), None)
        assert (in_e4m3.compute_share, in_e4m3.copy_share) == (pytest.approx(0.1), None)
        unknown = timed(dataclasses.replace(blank, flops=None), Summary(10.0, 9.0, 12.0), None, None)
        assert (unknown.tflops, unknown.compute_share, unknown.memory_share) == (None, None, None)

    @pytest.mark.parametrize(
        ("device", "memory"),
        [
            ("NVIDIA H200", 4800.0),
            ("NVIDIA H100 80GB HBM3", 3350.0),
            ("NVIDIA H100 PCIe", 2000.0),
            ("NVIDIA H100 NVL", 3900.0),
            ("NVIDIA H800", 3350.0),
            ("NVIDIA B200", 8000.0),
            ("NVIDIA L40S", 864.0),
            ("NVIDIA GeForce RTX 4090", 1008.0),
            ("NVIDIA GeForce RTX 4090 D", None),
            ("NVIDIA H20", None),
            ("NVIDIA GH200 480GB", None),
        ],
    )
    def test_datasheets(self, device: str, memory: float | None) -> None:
        limits = limits_of(device)
        assert (limits and limits.memory) == memory

    def test_ratios_are_to_the_fastest_library_of_the_same_case(self) -> None:
        found = with_ratios(
            [
                row("one", "triton", 10.0),
                row("one", "sdpa", 30.0, library=True),
                row("one", "cudnn", 15.0, library=True),
                row("one", "fa3", None, library=True),
                row("one, e4m3", "triton", 5.0, rivals="one"),
                row("two", "triton", 10.0),
            ]
        )
        assert [one.ratio for one in found] == [1.5, 0.5, 1.0, None, 3.0, None]
        assert found[0].best_library == "cudnn"

    def test_fastest_of_ours(self) -> None:
        found = [row("one", "triton", 10.0), row("one", "gluon", 8.0), row("one", "sdpa", 1.0, library=True)]
        found += [row("one", "reference", 2.0), row("two", "triton", None)]
        assert [one.implementation for one in fastest(found, "op")] == ["gluon"]

    def test_libraries_may_fail_to_run_but_not_be_wrong(self) -> None:
        broken = [
            Row("op", "case", "cudnn", "bf16", status, "why", library=True) for status in (rows.FAILED, rows.WRONG)
        ]
        assert failures(broken) == ["op, case, cudnn: wrong: why"]

    def test_files_are_replaced_as_a_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "kernels.json"
        write_atomically(path, "old")

        def fail(*_: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OutputError, match="cannot write .*disk full"):
            write_atomically(path, "new")
        assert path.read_text() == "old"
        assert list(path.parent.iterdir()) == [path]


def verdict(subject: Subject, numbers: dict[str, float]) -> targets.Verdict:
    """Of the first target of a subject, for rows with `numbers` as ratios and shares."""
    measured = [
        Row(subject.name, case, "triton", "", rows.MEASURED, us=1.0, ratio=number, copy_share=number)
        for case, number in numbers.items()
    ]
    (target,) = (one for one in targets.TARGETS if one.subject is subject)
    return targets.judge(measured, WAN_14B, [target])[0]


class TestTargets:
    CASES = tuple(case.name for case in subjects.PAIR.model_cases(WAN_14B))

    def test_met_missed_and_not_measured(self) -> None:
        assert verdict(subjects.PAIR, dict.fromkeys(self.CASES, 1.0)).verdict == targets.MET
        almost = verdict(subjects.PAIR, dict.fromkeys(self.CASES[1:], 1.5))
        assert (almost.verdict, almost.missing) == (targets.NOT_MEASURED, self.CASES[:1])
        assert verdict(subjects.PAIR, {self.CASES[0]: 0.99}).verdict == targets.MISSED
        assert verdict(subjects.PAIR, {}).verdict == targets.NOT_MEASURED

    def test_attention_is_judged_by_dtype(self) -> None:
        ratios = {"3168 tokens": 1.1, "3375 tokens": 1.0, "3168 tokens, e4m3": 1.5, "3375 tokens, e4m3": 1.3}
        measured = [
            Row("ring_attention", case, "triton", "", rows.MEASURED, us=1.0, ratio=ratio)
            for case, ratio in ratios.items()
        ]
        bf16, e4m3, *others = targets.judge(measured, WAN_14B)
        assert (bf16.verdict, bf16.least) == (targets.MET, 1.0)
        assert (e4m3.verdict, e4m3.least) == (targets.MISSED, 1.4)
        assert {one.verdict for one in others} == {targets.NOT_MEASURED}

    def test_norms_are_judged_by_bandwidth(self) -> None:
        names = [case.name for case in subjects.MODULATED_NORM.model_cases(WAN_14B)]
        assert verdict(subjects.MODULATED_NORM, dict.fromkeys(names, 0.8)).verdict == targets.MET
        assert verdict(subjects.MODULATED_NORM, dict.fromkeys(names, 0.79)).verdict == targets.MISSED


def linear_rows(us: dict[str, float], **changes: float) -> list[Row]:
    """A row for every case of fp8_linear and implementation; `changes` by implementation for the first case."""
    first, *others = subjects.FP8_LINEAR.model_cases(WAN_14B)
    found = [
        Row("fp8_linear", case.name, name, "e4m3", rows.MEASURED, us=time)
        for case in others
        for name, time in us.items()
    ]
    return found + [
        Row("fp8_linear", first.name, name, "e4m3", rows.MEASURED, us=time) for name, time in {**us, **changes}.items()
    ]


class TestChoices:
    def chosen(self, measured: list[Row]) -> list[dict[str, Any]]:
        return choose.choose(measured, WAN_14B, "NVIDIA H200", "abc", "bench kernels --choose")

    def test_the_fastest_on_average_is_chosen(self) -> None:
        found = self.chosen(linear_rows({"triton": 100.0, "cublaslt": 90.0, "reference": 1.0}, cublaslt=200.0))
        assert [(one["in"], one["out"], one["implementation"]) for one in found] == [
            (5120, 15360, "triton"),
            (5120, 5120, "cublaslt"),
            (5120, 13824, "cublaslt"),
            (13824, 5120, "cublaslt"),
        ]
        assert found[0]["measured"] == {
            "commit": "abc",
            "command": "bench kernels --choose",
            "us": {"triton": 100.0, "cublaslt": 145.0},
        }

    def test_noise_chooses_nothing(self) -> None:
        assert {one["implementation"] for one in self.chosen(linear_rows({"triton": 100.0, "cublaslt": 99.0}))} == {
            "triton"
        }

    def test_only_what_was_measured_everywhere_counts(self) -> None:
        measured = linear_rows({"triton": 100.0, "cublaslt": 50.0})
        measured = [one for one in measured if "3168" not in one.case or one.implementation != "cublaslt"]
        assert {one["implementation"] for one in self.chosen(measured)} == {"triton"}
        assert self.chosen([one for one in measured if "3168" not in one.case]) == []

    def test_other_devices_keep_their_rows(self) -> None:
        names = [implementation.name for implementation in FP8_LINEAR_OP.implementations]
        first = choose.updated("[]", self.chosen(linear_rows({"triton": 100.0, "cublaslt": 50.0})))
        other = [one | {"device": "NVIDIA L40S"} for one in self.chosen(linear_rows({"triton": 1.0}))]
        both = choose.updated(first, other)
        again = choose.updated(both, self.chosen(linear_rows({"triton": 10.0, "cublaslt": 50.0})))
        table = choices.parse(again, names)
        assert len(table) == 8
        assert set(table.values()) == {"triton"}
        assert choices.parse(both, names)[choices.Layer("NVIDIA H200", 5120, 5120, False, False)] == "cublaslt"
        with pytest.raises(choose.NothingToChooseError, match="no layer of fp8_linear was measured"):
            choose.updated(both, [])


class TestCommand:
    def test_without_a_gpu_nothing_is_measured(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert command.main(["kernels", "--json", str(tmp_path / "out.json")]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.strip().endswith(suite.NO_DEVICE)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--implementations", "triton,fast"], "no implementation 'fast'; there are cublaslt"),
            (["--choose", "--quick"], "--choose needs every picture size"),
            (["--sweep", "size=64x64"], "the suite kernels has its own sizes"),
        ],
    )
    def test_mistakes(self, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert command.main(["kernels", *arguments]) == 2
        assert complaint in capsys.readouterr().err

    def test_an_unknown_op_is_a_mistake(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            command.main(["kernels", "--op", "softmax"])
        assert stopped.value.code == 2
        assert "invalid choice: 'softmax'" in capsys.readouterr().err

    def test_selection(self) -> None:
        everything = suite.selected([], "", quick=False)
        assert {subject.name for subject, _ in everything} == {subject.name for subject in SUBJECTS}
        assert len({(subject.name, case.name) for subject, case in everything}) == len(everything)
        quick = suite.selected([], "", quick=True)
        assert {subject.name for subject, _ in quick} == {subject.name for subject in SUBJECTS}
        assert 2 * len(quick) <= len(everything)
        assert {case.tokens for _, case in quick if hasattr(case, "tokens")} == {3375}
        linear = suite.selected(["fp8_linear"], "3375 TOKENS", quick=False)
        assert {subject.name for subject, _ in linear} == {"fp8_linear", "fp8_quantize + fp8_linear"}
        assert {case.tokens for _, case in linear} == {3375}
        assert suite.selected([], "nothing like it", quick=False) == []

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
        """Something that looks like a GPU, and cases that take 10 us or what is set here by implementation."""
        table = tmp_path / "choices.json"
        table.write_text("[]")
        seen: dict[str, Any] = {"status": rows.MEASURED, "us": {}, "choices": table}

        def fake(subject: Subject, case: Any, conditions: Conditions) -> list[Row]:
            assert conditions.limits == Limits(989.0, 1979.0, 4800.0)
            blank = Row(
                subject.name, case.name, "", subject.dtype(case), seen["status"], bytes=1, flops=1, reason="why"
            )
            blank = dataclasses.replace(blank, rivals=subject.rivals(case))
            names = ("triton", *subject.libraries)
            found = [dataclasses.replace(blank, implementation=name, library=name != "triton") for name in names]
            if seen["status"] != rows.MEASURED:
                return found
            times = (seen["us"].get(one.implementation, 10.0) for one in found)
            return [
                timed(one, Summary(us, us, us), conditions.limits, conditions.ceilings)
                for one, us in zip(found, times, strict=True)
            ]

        environment = Environment("bench", "abc", False, "NVIDIA H200", "cuda", [9, 0], 1, {"torch": "2"}, "2026")
        monkeypatch.setattr(command, "resolve_device", lambda names: torch.device("cuda", 0))
        monkeypatch.setattr(command, "describe", lambda *_: environment)
        monkeypatch.setattr(bench, "measure_ceilings", lambda *_: Ceilings(4300.0, 790.0))
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(suite, "cache_bytes", lambda device: 1)
        monkeypatch.setattr(suite, "run_case", fake)
        monkeypatch.setattr(choose, "PATH", table)
        return seen

    def test_all_of_it(self, gpu: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        gpu["us"] = {"triton": 5.0}
        out, page = tmp_path / "kernels.json", tmp_path / "kernels.html"
        assert command.main(["kernels", "--json", str(out), "--html", str(page), "--choose"]) == 0
        said = capsys.readouterr()
        found = json.loads(out.read_text())
        assert validate(found) == []
        (run,) = found["runs"]
        assert (found["environment"]["commit"], found["environment"]["device"]) == ("abc", "NVIDIA H200")
        assert {one["ratio"] for one in run["rows"] if one["op"] == "ring_attention"} == {1.0, 2.0}
        assert run["figures"]["attention_bf16_ratio"]["value"] == 2.0
        assert "target 1, met: attention in bf16" in run["notes"][0]
        assert "FP8 GEMM with the quantise pass" in said.out
        assert f"[1/{len(suite.selected([], '', quick=False))}, " in said.err
        assert "4 choices written" in said.err
        assert len(json.loads(gpu["choices"].read_text())) == 4
        assert "times as fast as the best library call" in page.read_text()

    def test_what_is_wrong_ends_with_1(self, gpu: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        gpu["status"] = rows.WRONG
        assert command.main(["kernels", "--op", "ring_write", "--quick"]) == 1
        said = capsys.readouterr()
        assert "not right: ring_write, 3375 tokens, triton: wrong: why" in said.out
        assert " us" not in said.err.partition("ring_write")[2]

    def test_what_was_measured_is_kept_when_the_machine_goes(
        self,
        gpu: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        fake, calls = suite.run_case, []

        def fails_later(*given: Any) -> list[Row]:
            calls.append(given)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return fake(*given)

        monkeypatch.setattr(suite, "run_case", fails_later)
        out = tmp_path / "kernels.json"
        assert command.main(["kernels", "--op", "fp8_linear", "--json", str(out)]) == 130
        assert f"interrupted; {out} holds what was finished" in capsys.readouterr().err
        found = json.loads(out.read_text())
        assert validate(found) == []
        assert not found["complete"]
        assert found["runs"][0]["settings"]["cases"] == "2 of 16 cases"

    def test_no_such_case(self, gpu: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        assert command.main(["kernels", "--filter", "nothing like it"]) == 2
        assert "no case has 'nothing like it' in its name" in capsys.readouterr().err

    def test_nothing_to_choose_ends_with_1(self, gpu: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        assert command.main(["kernels", "--op", "ring_write", "--choose"]) == 1
        assert "nothing was chosen" in capsys.readouterr().out
        assert gpu["choices"].read_text() == "[]"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("", "it is a directory"), ("no/file.json", "does not exist; create it first"), ("file/x", "is not a folder")],
)
def test_paths_that_cannot_be_written_are_named(name: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=complaint):
        check_writable(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tables_tell_what_ran_and_what_did_not() -> None:
    absent = [row(case, "fa3", None, reason="not installed") for case in ("one", "two")]
    wrong = Row("op", "one", "gluon", "bf16", rows.WRONG, "result: relative error: 1, allowed up to 0.1")
    found = [timed(row(us=None, bytes=1), Summary(1.0, 1.0, 1.0), None, None), wrong, *absent]
    written = io.StringIO()
    Console(width=200, file=written).print(report.table(found), report.not_run(found))
    measured, left_out = written.getvalue().split("not run")
    assert "fa3" not in measured
    assert "wrong: result: relative error: 1, allowed up to 0.1" in measured
    assert left_out.count("fa3") == 1
    assert "not installed" in left_out


def test_a_case_in_one_line() -> None:
    found = [row(us=1234.5), row(implementation="fa3", us=None), row(implementation="cudnn", us=9.0)]
    assert report.line("op", "one", found) == "op · one: triton 1,234.5 us, cudnn 9.0 us"
    assert report.line("op", "one", [row(us=None)]) == "op · one: nothing can run"
