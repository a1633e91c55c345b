"""`inspect`: kernels of this machine, losses in FP8, memory at a precision."""

import json
from pathlib import Path

import pytest

from liveavatar_engine.cli import main


def _run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "200")
    code = main(["inspect", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_kernels_need_no_checkpoint(capsys, monkeypatch) -> None:
    code, out, _ = _run(capsys, monkeypatch, "--kernels")
    assert code == 0
    for op in ("ring_attention", "ring_write", "modulated_norm", "fp8_linear", "fp8_quantize"):
        assert op in out
    assert "absent: needs a CUDA device" in out
    assert "picked by itself" in out
    assert "liveavatar_kernels._C:" in out
    assert "LIVEAVATAR_KERNELS: not set" in out


def test_an_unknown_choice_of_kernels_is_one_line(capsys, monkeypatch) -> None:
    monkeypatch.setenv("LIVEAVATAR_KERNELS", "fast")
    code, _, err = _run(capsys, monkeypatch, "--kernels")
    assert code == 2
    assert "LIVEAVATAR_KERNELS must be one of" in err
    assert err.count("\n") == 1


def test_losses_in_fp8(checkpoint: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    rows_file = tmp_path / "losses.json"
    code, out, _ = _run(
        capsys, monkeypatch, str(checkpoint), "--precision", "--size", "64x64", "--json", str(rows_file)
    )
    rows = json.loads(rows_file.read_text())
    assert code == 0
    assert "synthetic portrait" in out
    assert [row["sqnr"] for row in rows] == sorted(row["sqnr"] for row in rows)
    by_name = {row["name"]: row for row in rows}
    assert not by_name["blocks.1.ffn.2"]["skipped"]
    assert by_name["text_embedding.0"]["skipped"]
    assert by_name["blocks.0.self_attn.q"]["calls"] == 5, "four steps and the prefill of the sink"
    assert all(20 < row["sqnr"] < 40 and 28 < row["weight_sqnr"] < 36 for row in rows)
    assert all(row["worst_sqnr"] <= row["sqnr"] + 1e-6 for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"losses.json"}


def test_the_folder_may_follow_the_option(checkpoint: Path, capsys, monkeypatch) -> None:
    code, out, _ = _run(capsys, monkeypatch, "--precision", str(checkpoint), "--size", "64x64")
    assert code == 0
    assert "blocks.*.ffn.0" in out


def test_fp8_halves_the_network(checkpoint: Path, capsys, monkeypatch) -> None:
    outputs = [
        _run(capsys, monkeypatch, str(checkpoint), "--size", "64x64", *arguments)[1]
        for arguments in (["--precision", "bf16"], ["--precision", "fp8"], ["--precision", "fp8", "--fp8-skip", "ffn"])
    ]
    assert len(set(outputs)) == 3


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "name a checkpoint's folder, or ask for --kernels or --devices"),
        (["--precision", "int3"], "name a checkpoint's folder"),
        (["CHECKPOINT", "--precision", "int3"], "precision must be one of"),
        (["CHECKPOINT", "--precision", "fp8", "--fp8-skip", "nothing_called_so"], "'nothing_called_so'"),
        (["CHECKPOINT", "--precision", "--json", "/no/such/folder/file.json"], "does not exist"),
    ],
    ids=["nothing", "no folder", "precision", "skip", "json"],
)
def test_what_cannot_be_done_is_one_line(arguments, complaint: str, checkpoint: Path, capsys, monkeypatch) -> None:
    arguments = [str(checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    code, _, err = _run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert complaint in err
    assert err.count("\n") == 1


class TestDevices:
    def test_a_layout_needs_no_checkpoint(self, capsys, monkeypatch) -> None:
        code, out, _ = _run(capsys, monkeypatch, "--devices", "5", "--step-ms", "110", "--vae-ms", "60")
        assert code == 0
        for stage in ("step 0", "step 1", "step 2", "step 3", "decode"):
            assert stage in out
        assert "109.1 frames/s in total, a block every 110 ms" in out
        assert "first frame 500 ms after its audio, 460 ms with early_first_frame" in out
        assert "sessions in real time (25 frames/s each): 4" in out
        assert "step 110 ms (given)" in out

    def test_what_was_not_measured_is_said(self, capsys, monkeypatch) -> None:
        _, out, _ = _run(capsys, monkeypatch, "--devices", "cuda:1,cuda:3", "--sequence-parallel", "2")
        assert "step 110 ms (the design's target, not measured here)" in out
        assert "2 devices are taken to share a step evenly" in out
        assert "steps 0-3 + decode (1 of 2)" in out
        assert out.index("cuda:1") < out.index("cuda:3")

    def test_several_lanes(self, capsys, monkeypatch) -> None:
        _, out, _ = _run(capsys, monkeypatch, "--devices", "7", "--sessions", "2", "--steps", "4")
        assert "in the slowest lane" in out
        assert "steps 2-3 + decode" in out

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--devices", "6"], "cuda:5 would have nothing to do"),
            (["--devices", "0"], "expected at least 1 device, not 0"),
            (["--devices", "cuda:0,,cuda:1"], "expected a number, or names such as cuda:0,cuda:1"),
            (["--devices", "cuda:0,cuda:0"], "named more than once: cuda:0"),
            (["--devices", "1", "--sequence-parallel", "2"], "1 devices are too few"),
            (["--devices", "2", "--costs", "no.json"], "--costs no.json: "),
            (["--step-ms", "5"], "--step-ms belongs to --devices"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_cannot_be_laid_out(self, arguments, complaint: str, capsys, monkeypatch) -> None:
        code, _, err = _run(capsys, monkeypatch, *arguments)
        assert code == 2
        assert complaint in err
        assert err.count("\n") == 1


def test_memory_of_every_rank(checkpoint: Path, capsys, monkeypatch) -> None:
    code, out, _ = _run(capsys, monkeypatch, str(checkpoint), "--devices", "cpu:0,cpu:1,cpu:2", "--size", "64x64")
    assert code == 0
    table = out[out.index("memory of") :]
    rows = {words[0]: words for line in table.splitlines() if (words := line.replace("│", " ").split())}
    assert [rows[rank][1] for rank in "012-"] == ["cpu:0", "cpu:1", "cpu:2", "cpu:2"]
    assert rows["0"][2:4] == ["steps", "0-1"]
    assert rows["2"][2] == "decode"
    assert rows["-"][2] == "encoders"
    assert rows["0"][4:] == rows["1"][4:], "they hold the same"
    assert rows["0"][4:] != rows["2"][3:]


def test_memory_of_ranks_that_cannot_be(checkpoint: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    for arguments, complaint in (
        ((str(tmp_path), "--devices", "2"), "it lacks"),
        ((str(checkpoint), "--devices", "a,b"), "device 'a': expected cpu:N or cuda:N"),
        ((str(checkpoint), "--devices", "7", "--sequence-parallel", "7"), "7"),
    ):
        code, out, err = _run(capsys, monkeypatch, *arguments)
        assert (code, out) == (2, "")
        assert complaint in err
        assert "Traceback" not in err
