"""`convert`, and what `inspect` and `generate` make of its result."""

from pathlib import Path

import pytest
from support import GOLDEN

from liveavatar_engine.cli import build_parser, generate, main
from liveavatar_engine.cli.settings import byte_count, offload
from liveavatar_engine.errors import ConfigError

LORA = str(GOLDEN / "lora.safetensors")


def _run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "fp8"
    assert (
        main(["convert", str(checkpoint), str(folder), "--lora", LORA, "--device", "cpu", "--shard-size", "200kB"]) == 0
    )
    return folder


def test_a_checkpoint_is_written(checkpoint: Path, tmp_path: Path, capsys) -> None:
    arguments = ("convert", str(checkpoint), str(tmp_path / "fp8"), "--fp8-skip", "none", "--link", "--device", "cpu")
    code, _, err = _run(capsys, *arguments)
    assert code == 0
    assert f"wrote {tmp_path / 'fp8'}: fp8," in err.replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]


def test_it_is_inspected(converted: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = _run(capsys, "inspect", str(converted), "--size", "64x64")
    assert code == 0
    assert "converted to fp8, all linear layers but text_embedding," in out
    assert "lora.safetensors merged (sha256 " in out
    assert "float8_e4m3fn" in out
    assert "linear layers in e4m3, some parameters in float32" in out
    assert "ready to use" in out
    assert not [line for line in out.splitlines() if "unusable" in line or "unexpected" in line]


def test_inspecting_at_another_precision_is_one_line(converted: Path, capsys) -> None:
    for arguments in (["--precision", "bf16"], ["--fp8-skip", "ffn"]):
        code, _, err = _run(capsys, "inspect", str(converted), *arguments)
        assert code == 2
        assert "converted " in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "row"),
    [
        ([], "offloaded: 0.03 MB of host memory"),
        (["--offload", "none"], "text encoder"),
        (["--offload", "text_encoder,vae"], "offloaded: 0.70 MB of host memory"),
        (["--device", "cpu"], "memory on the CPU"),
    ],
    ids=["default", "none", "both", "cpu"],
)
def test_offloaded_parts_are_shown(arguments: list[str], row: str, checkpoint: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = _run(capsys, "inspect", str(checkpoint), "--size", "64x64", *arguments)
    assert code == 0
    assert row in out
    assert ("offloaded" in out) == ("none" not in arguments and "cpu" not in arguments)
    assert ("free on this machine" in out) == ("cpu" in arguments)


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (("convert", "CHECKPOINT", "NEW", "--shard-size", "many"), "--shard-size 'many': expected a size such as 5GB"),
        (("convert", "CHECKPOINT", "NEW", "--precision", "bf16", "--fp8-skip", "ffn"), "no meaning with precision"),
        (("convert", "CHECKPOINT", "NEW", "--fp8-skip", "fnn"), "no linear layer's name contains 'fnn'"),
        (("convert", "CHECKPOINT", "NEW", "--lora", "none.safetensors"), "none.safetensors: no such file"),
        (("convert", "CHECKPOINT", "NEW", "--device", "tpu"), "expected auto, cpu, cuda or cuda:N"),
        (("convert", "CHECKPOINT", "CHECKPOINT"), "is not empty; a checkpoint goes to a new or empty folder"),
        (("convert", "NEW", "NEW"), "no such directory"),
        (("convert", "CONVERTED", "NEW"), "convert the original instead"),
        (("inspect", "CHECKPOINT", "--offload", "audio"), "offload: expected some of text_encoder, vae, not audio"),
        (("inspect", "CHECKPOINT", "--device", "tpu"), "expected auto, cpu, cuda or cuda:N"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(
    command: tuple[str, ...], complaint: str, checkpoint: Path, converted: Path, tmp_path: Path, capsys
) -> None:
    places = {"CHECKPOINT": str(checkpoint), "CONVERTED": str(converted), "NEW": str(tmp_path / "new")}
    code, _, err = _run(capsys, *(places.get(argument, argument) for argument in command))
    assert code == 2
    assert complaint in err
    assert err.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(checkpoint: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("liveavatar_engine.weights.convert._write_network", interrupt)
    code, _, err = _run(capsys, "convert", str(checkpoint), str(tmp_path / "new"), "--device", "cpu")
    assert code == 130
    assert "interrupted; nothing was written" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("900 mb", 900 * 10**6), ("1.5GiB", 3 << 29), ("200k", 200_000), ("77", 77), ("3B", 3)],
)
def test_sizes_of_files(text: str, count: int) -> None:
    assert byte_count(text, "--size") == count


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5 apples", "1e9", "5IB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--size .*: expected a size such as 5GB or 900MB"):
        byte_count(text, "--size")


def test_parts_to_offload() -> None:
    assert (offload(None), offload("none"), offload("vae,text_encoder")) == (
        ("text_encoder",),
        (),
        ("vae", "text_encoder"),
    )


def test_generate_takes_parts_to_offload() -> None:
    files = ("--checkpoint", "c", "--image", "i", "--audio", "a", "--out", "o.mp4")
    for options, parts in (((), ("text_encoder",)), (("--offload", "none"), ()), (("--offload", "vae"), ("vae",))):
        arguments = build_parser().parse_args(["generate", *files, *options])
        assert generate._engine_config(arguments).offload == parts
