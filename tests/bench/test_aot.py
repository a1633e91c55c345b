"""Ahead-of-time reports: what makes a kernel unacceptable, and the table."""

from dataclasses import replace

import pytest
from liveavatar_kernels.catalog import kernel_specs

from bench.aot import Report, _judged, main, markdown

GOOD = Report("ring_attention bf16", 90, 8, 231, 0, 0, 164_864, {"HGMMA": 112}, ())


def _spec(name: str):
    return next(spec for spec in kernel_specs("ring_attention", 90) if spec.name.startswith(name))


def test_a_good_kernel_has_no_complaints() -> None:
    assert _judged(_spec("ring_attention bf16"), GOOD, serialised=False).complaints == ()


@pytest.mark.parametrize(
    ("change", "serialised", "complaint"),
    [
        ({"spills": 8}, False, "spills 8 bytes"),
        ({"shared": 240_000}, False, "240000 bytes of shared memory; 232448 are there"),
        ({"instructions": {"HMMA": 3}}, False, "no HGMMA"),
        ({}, True, "serialised its wgmma"),
    ],
    ids=["spills", "shared memory", "slow matrix instructions", "serialised"],
)
def test_bad_kernels_are_named(change, serialised: bool, complaint: str) -> None:
    report = _judged(_spec("ring_attention bf16"), replace(GOOD, **change), serialised)
    assert any(complaint in said for said in report.complaints)


def test_e4m3_wants_its_own_instructions() -> None:
    report = _judged(_spec("ring_attention e4m3"), GOOD, serialised=False)
    assert report.complaints == ("no QGMMA",)


def test_table_has_a_row_for_each_kernel() -> None:
    table = markdown("3.6.0", (90,), [GOOD, GOOD])
    assert "Triton 3.6.0, sm_90" in table
    assert table.count("| sm_90 | ring_attention bf16 | 8 | 231 | 0 | 0 | 164864 | 112 HGMMA |") == 2


def test_refuses_to_compile_in_the_interpreter(capsys: pytest.CaptureFixture) -> None:
    assert main(["--arch", "90"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
