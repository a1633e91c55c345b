"""`compare` on a small package that has the reference's names and signature, written for these tests."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from liveavatar_engine.bench.command import main
from liveavatar_engine.bench.compare import reference, worker
from liveavatar_engine.bench.compare import run as runner
from liveavatar_engine.bench.compare.checkout import NETWORK_MODULE, Checkout, module_file
from liveavatar_engine.bench.compare.inputs import weights
from liveavatar_engine.bench.compare.job import ENGINE, REFERENCE, Job, Measured
from liveavatar_engine.bench.compare.report import (
    OWN,
    UNROUNDED,
    CompareResult,
    Difference,
    Side,
    notes_of,
    stand_in_table,
)
from liveavatar_engine.bench.compare.run import run_compare
from liveavatar_engine.bench.compare.sides import run_side
from liveavatar_engine.bench.compare.stand_ins import StandIn, StandInLog
from liveavatar_engine.bench.compare.suite import CompareOptions, add_arguments, measure
from liveavatar_engine.bench.settings import Settings
from liveavatar_engine.config.engine import REFERENCE_FP8_SKIP
from liveavatar_engine.errors import CheckpointError, ConfigError, InputError

REFERENCE_LIKE = Path(__file__).parent / "reference_like"
SETTINGS = Settings("tiny", None, None, "cpu", "64x96", "fp32", blocks=2, warm_up=1, steps=2)


@pytest.fixture(scope="module")
def result() -> CompareResult:
    """A whole comparison, with processes of their own, long enough for the sink's change and a full ring."""
    return run_compare(REFERENCE_LIKE, replace(SETTINGS, warm_up=4))


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the package in which some text of the network's file is another one."""

    def edit(old: str, new: str) -> Path:
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(REFERENCE_LIKE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / module_file(NETWORK_MODULE)
        source = file.read_text(encoding="utf-8")
        assert old in source
        file.write_text(source.replace(old, new), encoding="utf-8")
        return copy

    return edit


def test_an_equal_network_differs_by_its_roundings_alone(result: CompareResult) -> None:
    by_other = {one.other: one for one in result.differences}
    assert len(by_other[UNROUNDED].latents) == 6
    assert max(by_other[UNROUNDED].latents + by_other[UNROUNDED].velocities) < 1e-6
    assert 1e-5 < max(by_other[OWN].latents) < 1e-3
    assert not result.problems
    assert any("bf16 in front of norm3" in note and "remains" in note for note in result.notes)


def test_times_are_those_after_the_warm_up(result: CompareResult) -> None:
    for side in (result.reference, result.engine):
        assert len(side.measured.step_ms) == 2 * 2
        assert min(side.measured.step_ms) > 0
        assert side.block_ms == pytest.approx([sum(side.measured.step_ms[:2]), sum(side.measured.step_ms[2:])])
    assert result.ratio == result.reference.step_share / result.engine.step_share
    assert "4 blocks" in result.warm_up


def test_stand_ins_are_listed(result: CompareResult) -> None:
    names = {one.name for one in result.reference.measured.stand_ins}
    assert {"flash_attention", "cudnn_attention_forward_with_lse", "random.randint", 'the literal "cuda"'} <= names
    assert {"diffusers.models.attention.AdaLayerNorm", "einops.rearrange"} <= names
    assert not any("PeftAdapterMixin" in name for name in names), "imported, but not used"
    assert all(one.instead and one.reason for one in result.reference.measured.stand_ins)


def test_the_run_of_a_report(result: CompareResult) -> None:
    run = result.as_run()
    assert run.figure("step_ratio") == result.ratio
    assert run.figure("reference_step_ms_p99") == result.reference.step_p99
    assert run.figure("latents_from_unrounded_reference_worst") == max(result.differences[1].latents)
    series = {one.name: one.values for one in run.series}
    assert series["engine_step_ms"] == result.engine.measured.step_ms
    assert len(run.rows) == stand_in_table(run).row_count == len(result.reference.measured.stand_ins)
    assert json.loads(json.dumps(result.as_dict()))["ratio"] == result.ratio


def test_figures_of_a_side() -> None:
    side = Side("bf16", "eager", Measured((4.0, 1.0, 6.0, 1.0, 5.0, 1.0), None), steps=2)
    assert side.block_ms == (5.0, 7.0, 6.0)
    assert (side.step_p50, side.step_share) == (2.5, 3.0)


@pytest.mark.parametrize(
    ("precisions", "own", "unrounded", "complaints"),
    [
        (("fp32", "fp32"), 2e-3, 1e-6, 0),
        (("fp32", "fp32"), 2e-3, 1e-3, 1),
        (("fp32", "fp32"), 0.1, 0.1, 2),
        (("fp32", "bf16"), 1e-2, 1e-2, 0),
        (("bf16", "fp32"), 0.2, 0.0, 1),
        (("fp8", "bf16"), 0.2, 0.0, 0),
        (("bf16", "bf16"), float("nan"), 0.0, 1),
    ],
)
def test_what_is_no_rounding_is_a_problem(
    precisions: tuple[str, str], own: float, unrounded: float, complaints: int, result: CompareResult
) -> None:
    reference, engine = (
        replace(side, precision=precision)
        for side, precision in zip((result.reference, result.engine), precisions, strict=True)
    )
    differences = tuple(Difference(other, (0.0,), (worst,)) for other, worst in ((OWN, own), (UNROUNDED, unrounded)))
    changed = replace(result, reference=reference, engine=engine, differences=differences)
    assert len(changed.problems) == complaints


@pytest.mark.parametrize(
    ("precisions", "limit"),
    [(("fp32", "fp32"), "norm3"), (("bf16", "fp32"), "one unit"), (("bf16", "fp8"), "e4m3"), (("fp8", "fp8"), "e4m3")],
)
def test_what_limits_the_agreement_is_told(precisions: tuple[str, str], limit: str, result: CompareResult) -> None:
    told = notes_of(precisions, result.differences)[0]
    assert limit in told
    assert ("remains" in told) == (precisions == ("fp32", "fp32"))
    assert "remains" not in notes_of(precisions, result.differences[:1])[0]


def run_reference(checkout: Path, precision: str) -> tuple[Measured, dict[str, torch.Tensor]]:
    """The reference's side in this process."""
    settings = replace(SETTINGS, precision=precision)
    return run_side(Job(REFERENCE, settings, precision, checkout, compiled=False, threads=1))


def test_another_network_is_told(edited: Callable[..., Path]) -> None:
    _, theirs = run_reference(edited("PERTURBATION = 0.0", "PERTURBATION = 0.5"), "fp32")
    _, ours = run_side(Job(ENGINE, SETTINGS, "fp32", REFERENCE_LIKE, compiled=False, threads=1))
    assert min(runner._differences(ours, theirs)[0].latents) > 0.05


def test_bf16_agrees_as_far_as_bf16_can() -> None:
    settings = replace(SETTINGS, precision="bf16")
    _, theirs = run_reference(REFERENCE_LIKE, "bf16")
    _, ours = run_side(Job(ENGINE, settings, "bf16", REFERENCE_LIKE, compiled=False, threads=1))
    (difference,) = runner._differences(ours, theirs)
    assert 1e-4 < max(difference.latents) < 3 * 2**-8


def test_the_references_own_fp8_skips_what_its_scripts_skip() -> None:
    cpu, log, model = torch.device("cpu"), StandInLog(), SETTINGS.model()
    with reference.imported(Checkout.find(REFERENCE_LIKE), cpu, torch.bfloat16, False, log) as module:
        made = (weights(SETTINGS, cpu, torch.bfloat16) for _ in range(2))
        plain, quantized = (
            dict(reference.ReferenceModel(module, model, drawn, cpu, torch.bfloat16, skip, log).network.state_dict())
            for drawn, skip in zip(made, (None, REFERENCE_FP8_SKIP), strict=True)
        )
    changed = {name for name, tensor in plain.items() if not tensor.equal(quantized[name])}
    assert {"blocks.0.ffn.0.weight", "audio_injector.injector.0.k.weight"} <= changed
    assert not any(part in name for name in changed for part in REFERENCE_FP8_SKIP)
    assert any(one.name == "torch.compile" for one in log.used)


def test_fp8_agrees_as_far_as_fp8_can() -> None:
    settings = replace(SETTINGS, precision="fp8")
    _, theirs = run_reference(REFERENCE_LIKE, "fp8")
    _, ours = run_side(Job(ENGINE, settings, "fp8", REFERENCE_LIKE, compiled=False, threads=1))
    (difference,) = runner._differences(ours, theirs)
    assert 5e-3 < max(difference.latents) < 0.1


def test_nothing_is_left_behind() -> None:
    modules, draw = set(sys.modules), sys.modules["random"].randint
    autocast, compiler = torch.amp.autocast, torch.compile
    run_reference(REFERENCE_LIKE, "bf16")
    new = {name.partition(".")[0] for name in set(sys.modules) - modules}
    assert not new & {"liveavatar", "diffusers", "einops", "flash_attn"}
    assert sys.modules["random"].randint is draw
    assert (torch.amp.autocast, torch.compile) == (autocast, compiler)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--reference .*absent: no such folder"):
        Checkout.find(tmp_path / "absent")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; expected the folder"):
        Checkout.find(tmp_path / "file")


def test_a_folder_that_is_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a checkout of Live Avatar: liveavatar/models/wan/causal_model_s2v\.py"):
        Checkout.find(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("class CausalWanModel_S2V", "class Other", "has no class CausalWanModel_S2V"),
        ("def _forward_sink", "def _forward_cond", "has no _forward_sink"),
        ("crossattn_cache=None,", "cache=None,", r"_forward_inference has no argument crossattn_cache"),
        ("ffn_dim=8192,", "", r"__init__ has no argument ffn_dim"),
        ("def forward(", "def forward", "not a Python file that can be read"),
    ],
)
def test_another_version(old: str, new: str, complaint: str, edited: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=complaint):
        Checkout.find(edited(old, new))


def test_a_version_is_named(edited: Callable[..., Path]) -> None:
    one, other = Checkout.find(REFERENCE_LIKE), Checkout.find(edited("0.0", "0.5"))
    assert "sha256" in one.version
    assert one.version != other.version


def test_a_package_without_stand_in(edited: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="imports no_such_package, which is not installed and has no stand-in"):
        run_reference(edited("import random\n", "import random\nimport no_such_package\n"), "fp32")


def test_other_parameters(edited: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="1 parameters that ours has not: extra"):
        run_reference(edited("self.sink_angles = None", "self.extra = torch.nn.Parameter(torch.ones(1))"), "fp32")
    with pytest.raises(InputError, match=r"cond_encoder\.weight is absent, expected \[64"):
        run_reference(edited("self.sink_angles = None", "del self.cond_encoder"), "fp32")


def failed(job: Job, folder: Path) -> Exception:
    """What `run_compare` raises after the job's process, here this one, has failed."""
    (folder / worker.JOB).write_text(job.to_json(), encoding="utf-8")
    (folder / worker.OUTPUT).touch()
    assert worker.main(folder) == 1
    assert not (folder / worker.RESULT).exists()
    return runner._failure(job, folder, 1)


def test_code_that_fails_is_one_error_with_its_place(edited: Callable[..., Path], tmp_path: Path) -> None:
    broken = edited("latents = x[0][None]", 'raise ValueError("no such thing\\nat all")')
    error = failed(Job(REFERENCE, SETTINGS, "fp32", broken, compiled=False, threads=1), tmp_path)
    assert isinstance(error, InputError)
    place = r"its code fails in .*causal_model_s2v\.py, line \d+: ValueError: no such thing"
    assert re.fullmatch(rf"--reference {broken}: {place}", str(error))


def test_errors_of_a_side_keep_their_class(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "golden/checkpoint/config.json", tmp_path)
    settings = replace(SETTINGS, preset=None, checkpoint=str(tmp_path))
    error = failed(Job(ENGINE, settings, "fp32", REFERENCE_LIKE, compiled=False, threads=1), tmp_path)
    assert isinstance(error, CheckpointError)
    assert str(error).startswith(f"compare, engine: {tmp_path}: tensors do not fit the model")


def test_a_failure_of_the_engine_is_no_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "run_side", lambda job: {}["nothing"])
    error = failed(Job(ENGINE, SETTINGS, "fp32", REFERENCE_LIKE, compiled=False, threads=1), tmp_path)
    assert type(error) is RuntimeError
    assert "KeyError" in str(error)


def test_too_little_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(job: Job) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(worker, "run_side", full)
    error = failed(Job(REFERENCE, SETTINGS, "fp32", REFERENCE_LIKE, compiled=False, threads=1), tmp_path)
    assert isinstance(error, ConfigError)
    assert str(error) == "compare, reference: CUDA out of memory. Tried to allocate 9 GiB"


def test_compilation_that_fails_is_noted_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the reference is compiled first; `_run` stands in for the processes."""
    asked = []

    def run(job: Job) -> tuple[Measured, dict[str, torch.Tensor]]:
        asked.append((job.side, job.compiled, job.settings.warm_up))
        if job.compiled and job.side == REFERENCE:
            raise InputError("its code fails: Unsupported")
        ones = torch.ones(1, 1)
        return Measured((1.0, 1.0), None), {"latents": ones, "velocity": ones}

    monkeypatch.setattr(runner, "_run", run)
    monkeypatch.setattr(runner, "_compiles", lambda settings, asked: asked != "off")
    result = run_compare(REFERENCE_LIKE, SETTINGS)
    assert asked == [(REFERENCE, True, 8), (REFERENCE, False, 8), (ENGINE, False, 8)]
    assert any("without torch.compile, with which it fails: its code fails: Unsupported" in n for n in result.notes)
    with pytest.raises(InputError, match="Unsupported"):
        run_compare(REFERENCE_LIKE, SETTINGS, reference_compile="on")


def test_latents_that_are_not_finite_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.tensor([[1.0], [float("nan")]])
    monkeypatch.setattr(runner, "_run", lambda job: (Measured((1.0,), None), {"latents": latents}))
    with pytest.raises(InputError, match="its latents are not finite, first in block 1"):
        run_compare(REFERENCE_LIKE, SETTINGS)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"schedule": "diagonal"}, "no other schedule than 'sequential'"),
        ({"motion_tokens": False}, "no other motion_tokens"),
    ],
)
def test_settings_that_the_reference_does_not_know(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        run_compare(REFERENCE_LIKE, replace(SETTINGS, **changes))


def test_unknown_choices() -> None:
    with pytest.raises(ConfigError, match="reference precision: 'fp4' is none of auto, fp32, bf16, fp8"):
        run_compare(REFERENCE_LIKE, SETTINGS, reference_precision="fp4")
    with pytest.raises(ConfigError, match="reference compile: 'maybe'"):
        run_compare(REFERENCE_LIKE, SETTINGS, reference_compile="maybe")


def test_a_killed_process_is_told(tmp_path: Path) -> None:
    job = Job(REFERENCE, SETTINGS, "fp32", REFERENCE_LIKE, compiled=False, threads=1)
    (tmp_path / "output.txt").touch()
    assert "ended with -9; if it was killed, memory was too small" in str(runner._failure(job, tmp_path, -9))


def test_job_and_result_survive_their_way() -> None:
    job = Job(REFERENCE, replace(SETTINGS, lora="a"), "fp8", REFERENCE_LIKE, compiled=True, threads=3)
    assert Job.from_json(job.to_json()) == job
    measured = Measured((1.5, 2.0), 7, (StandIn("a", "b", "c"),))
    assert Measured.from_json(measured.to_json()) == measured


def test_arguments() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert CompareOptions.of(parser.parse_args([])) is None
    options = CompareOptions.of(parser.parse_args(["--reference", "x", "--reference-compile", "off"]))
    assert options == CompareOptions(Path("x"), "auto", "off")


def test_the_suite_frees_the_device_first() -> None:
    calls: list[str] = []
    bench = SimpleNamespace(forget=lambda: calls.append("forget"), say=calls.append)
    with pytest.raises(InputError):
        measure(CompareOptions(Path("/no/such")), SETTINGS, bench)  # type: ignore[arg-type]
    assert calls == ["forget"]


def test_the_command_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["compare", "--preset", "tiny", "--size", "64x64", "--device", "cpu"]
    assert main([*common, "--reference", str(tmp_path)]) == 2
    assert "not a checkout of Live Avatar" in capsys.readouterr().err
    assert main(common) == 2
    assert "--reference" in capsys.readouterr().err
