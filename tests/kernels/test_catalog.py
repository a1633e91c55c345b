"""The catalog of ops, how an op picks an implementation, and the environment's say in it."""

import inspect

import pytest
import torch
from liveavatar_kernels import KernelUnavailableError, catalog
from liveavatar_kernels.catalog import OPS
from liveavatar_kernels.dispatch import Implementation, Op, rows_per_program, triton_absent
from liveavatar_kernels.environment import Environment

CPU = torch.device("cpu")


def test_lists_every_op_with_what_runs_here() -> None:
    entries = {entry.name: entry for entry in catalog(CPU)}
    assert tuple(entries) == OPS
    for entry in entries.values():
        assert entry.implementations["reference"] is None
        assert entry.implementations["triton"] is None, "the interpreter is on in tests"
        assert "reference" in entry.automatic
        assert "triton" not in entry.automatic, "nobody wants the interpreter unasked"
        assert "implementation: " in entry.signature


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_kernels_are_described_in_full(capability: int) -> None:
    entries = catalog(CPU, capability)
    names = [spec.name for entry in entries for spec in entry.kernels]
    assert len(set(names)) == len(names)
    for entry in entries:
        assert entry.kernels or (capability < 89 and entry.name.startswith("fp8"))
        for spec in entry.kernels:
            arguments = inspect.signature(spec.function.fn).parameters
            assert set(spec.signature) | set(spec.constexprs) == set(arguments)
            assert not set(spec.signature) & set(spec.constexprs)
            assert set(spec.divisible_by_16) <= set(spec.signature)
            if capability < 89:
                assert not any("fp8" in kind for kind in spec.signature.values())


def _op(*names: str, absent: tuple[str, ...] = ()) -> Op:
    return Op(
        "an_op",
        tuple(
            Implementation(
                name,
                run=lambda: None,
                absent=lambda device, name=name: "not here" if name in absent else None,
                automatic=("cpu",) if name != "library" else (),
            )
            for name in names
        ),
    )


def test_the_first_that_is_there_is_taken() -> None:
    assert _op("cuda", "triton", "reference").choose(CPU, None) == "cuda"
    assert _op("cuda", "triton", "reference", absent=("cuda",)).choose(CPU, None) == "triton"
    assert _op("library", "reference").choose(CPU, None) == "reference"
    assert _op("library", "reference").choose(CPU, None, prefer=("library",)) == "library"


def test_what_refuses_a_call_is_passed_over_or_complained_about() -> None:
    op = _op("triton", "reference")
    refuses = {"triton": "no float64"}.get
    assert op.choose(CPU, None, refuses=refuses) == "reference"
    with pytest.raises(KernelUnavailableError, match="an_op: 'triton' cannot run here: no float64"):
        op.choose(CPU, "triton", refuses=refuses)
    with pytest.raises(KernelUnavailableError, match="nothing can run this call"):
        _op("triton").choose(CPU, None, refuses=refuses)


def test_the_environment_overrides_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _op("cuda", "triton", "reference", absent=("cuda",))
    monkeypatch.setenv("LIVEAVATAR_KERNELS", "reference")
    assert op.choose(CPU, None) == "reference"
    assert op.choose(CPU, "triton") == "triton", "an argument says more than the environment"
    assert op.choose(CPU, None, prefer=("triton",)) == "reference"
    monkeypatch.setenv("LIVEAVATAR_KERNELS", "cuda")
    assert op.choose(CPU, None) == "triton", "absent is allowed"


def test_environment_is_checked() -> None:
    assert Environment.read({}).kernels is None
    assert Environment.read({"LIVEAVATAR_KERNELS": ""}).kernels is None
    assert Environment.read({"LIVEAVATAR_KERNELS": "triton"}).kernels == "triton"
    with pytest.raises(ValueError, match="must be one of reference, triton, cuda, not 'fast'"):
        Environment.read({"LIVEAVATAR_KERNELS": "fast"})


def test_triton_is_absent_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    reason = triton_absent(CPU)
    assert reason is not None
    assert "TRITON_INTERPRET" in reason
    assert triton_absent(torch.device("meta")) == "no kernels for meta"


def test_a_kernel_that_is_broken_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is absent is passed over: an error of a kernel that was picked reaches the caller."""
    from liveavatar_kernels.fp8_quantize import fp8_quantize, kernel

    def broken(*_: object) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setenv("LIVEAVATAR_KERNELS", "triton")
    monkeypatch.setattr(kernel, "fp8_quantize", broken)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        fp8_quantize(torch.ones(2, 32))


def test_a_program_takes_wide_rows_one_by_one_and_narrow_ones_together() -> None:
    assert [rows_per_program(block, 2048, "cuda") for block in (8192, 2048, 1024, 64)] == [1, 1, 2, 32]
    assert rows_per_program(8192, 2048, "cpu") > 1
