"""The ledger: what goes in, and what the README says of it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import ledger
from liveavatar_engine.errors import InputError

STEP = {
    "step_ms_p50": {"value": 110.06, "unit": "ms", "label": ""},
    "host_ms_p50": {"value": None, "unit": "", "label": ""},
}
DOCUMENT: dict[str, Any] = {
    "complete": True,
    "environment": {
        "command": "bench step",
        "commit": "0123456789abcdef",
        "dirty": False,
        "device": "NVIDIA H200",
        "device_kind": "cuda",
        "versions": {"torch": "2.11.0"},
        "date": "2026-11-21T10:00:00Z",
        "memory_bytes": 1,
    },
    "runs": [
        {
            "suite": "step",
            "status": "measured",
            "problems": [],
            "settings": {"preset": "14b", "size": "704x384", "precision": "fp8", "kv_precision": "fp8"},
            "figures": STEP,
        },
    ],
}


def document(date: str = "2026-11-21T10:00:00Z", **changes: Any) -> dict[str, Any]:
    made = copy.deepcopy(DOCUMENT)
    made["environment"]["date"] = date
    made["environment"].update(changes)
    return made


def test_a_run_is_a_line(tmp_path: Path) -> None:
    rows = ledger.rows_of(document())
    assert ledger.append(tmp_path, rows) == [tmp_path / "step.jsonl"]
    (line,) = (tmp_path / "step.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert set(row) == {name for name, _ in ledger._FIELDS}
    assert row["figures"] == {"step_ms_p50": 110.06}, "what has no value is no figure"
    assert (row["commit"], row["device"], row["command"]) == ("0123456789abcdef", "NVIDIA H200", "bench step")
    assert ledger.append(tmp_path, rows) == [], "it stands there already"
    ledger.append(tmp_path, ledger.rows_of(document("2026-11-22T10:00:00Z")))
    assert [row["date"][:10] for row in ledger.read(tmp_path)] == ["2026-11-21", "2026-11-22"]


def test_only_what_is_complete_and_right_goes_in() -> None:
    unfinished = {**document(), "complete": False}
    assert ledger.rows_of(unfinished) == []
    failed = document()
    failed["runs"][0]["status"] = "failed"
    assert ledger.rows_of(failed) == []
    wrong = document()
    wrong["runs"][0]["problems"] = ["not right: ring_write"]
    assert ledger.rows_of(wrong) == []


def test_a_cpu_has_a_file_of_its_own_that_nobody_reads(tmp_path: Path) -> None:
    rows = ledger.rows_of(document(device="CPU", device_kind="cpu"))
    assert ledger.append(tmp_path, rows) == [tmp_path / "dry-run.jsonl"]
    assert ledger.read(tmp_path) == []
    (tmp_path / "step.jsonl").write_text((tmp_path / "dry-run.jsonl").read_text())
    assert ledger.read(tmp_path) == [], "not even by another name"
    assert "No figure of a GPU" in ledger.section(ledger.read(tmp_path))


def test_the_readme_shows_the_newest_with_its_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger.append(tmp_path, ledger.rows_of(document("2026-11-20T10:00:00Z", commit="f" * 40)))
    newer = document("2026-11-21T10:00:00Z")
    newer["runs"][0]["figures"] = {**STEP, "step_p99_over_p50": {"value": 1.02, "unit": "", "label": ""}}
    other = copy.deepcopy(newer["runs"][0])
    other["settings"]["kv_precision"] = "bf16"
    newer["runs"].append(other)
    ledger.append(tmp_path, ledger.rows_of(newer))
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{ledger.START}\nold\n{ledger.END}\n\nmore\n")
    assert ledger.main(["--ledger", str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{ledger.START}\nMeasured with `make gpu-gate`, newest on 2026-11-21.")
    assert text.endswith(f"{ledger.END}\n\nmore\n")
    assert "old" not in text
    row = "| step | NVIDIA H200 | 14b, 704x384, fp8, kv fp8 | 110.1 ms a step, p99/p50 1.020 | 2026-11-21 | 01234567 |"
    assert row in text
    assert "kv bf16" in text
    assert "ffffffff" not in text
    assert ledger.main(["--ledger", str(tmp_path), "--readme", str(readme)]) == 0
    assert readme.read_text() == text, "writing it again changes nothing"


def test_changes_are_told() -> None:
    assert "| 01234567 with changes |" in ledger.section(ledger.rows_of(document(dirty=True)))


@pytest.mark.parametrize("text", ["", f"{ledger.END}\n{ledger.START}\n", f"{ledger.START}\n", f"{ledger.START}\n" * 2])
def test_a_readme_without_markers_is_left_alone(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert ledger.main(["--ledger", str(tmp_path), "--readme", str(readme)]) == 2
    assert "expected one line <!-- ledger:start -->" in capsys.readouterr().err
    assert readme.read_text() == text


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("{", "line 1: not JSON"), ("[]", "suite is missing"), ('{"suite": "step"}', "commit is missing")],
)
def test_what_is_no_ledger_is_named(line: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "step.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=complaint):
        ledger.read(tmp_path)


def test_rows_of_another_machine_are_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    ledger.append(there, [*ledger.rows_of(document()), *ledger.rows_of(document(device="CPU", device_kind="cpu"))])
    assert ledger.main(["--ledger", str(here), "--add", str(there)]) == 0
    assert [path.name for path in here.iterdir()] == ["step.jsonl"]
    assert ledger.main(["--ledger", str(here), "--add", str(there)]) == 0
    assert len((here / "step.jsonl").read_text().splitlines()) == 1
