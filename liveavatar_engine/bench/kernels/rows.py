"""What is reported: a row per case and implementation, and what follows from the rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .timing import Ceilings, Summary

MEASURED, ABSENT, REFUSED, SKIPPED = "measured", "absent", "refused", "skipped"
WRONG, FAILED, UNCHECKED = "wrong", "failed", "unchecked"
"""What became of a row; only MEASURED has a time. UNCHECKED: the reference failed, FAILED: the call itself did."""
TRUTHS = ("reference", "emulation")
"""Implementations that others are compared with; timed only when they are named."""


class Limits(NamedTuple):
    """Of a datasheet: dense products in TFLOP/s, memory in GB/s."""

    bf16: float
    e4m3: float
    memory: float


_DATASHEETS = (
    (r"\bH200 NVL\b", Limits(835.0, 1671.0, 4800.0)),
    (r"\bH100 NVL\b", Limits(835.0, 1671.0, 3900.0)),
    (r"\bH200\b", Limits(989.0, 1979.0, 4800.0)),
    (r"\bH[18]00 PCIe\b", Limits(756.0, 1513.0, 2000.0)),
    (r"\bH[18]00\b", Limits(989.0, 1979.0, 3350.0)),
    (r"\bB200\b", Limits(2250.0, 4500.0, 8000.0)),
    (r"\bL40S\b", Limits(362.0, 733.0, 864.0)),
    (r"\bRTX 4090$", Limits(165.2, 330.3, 1008.0)),
)
"""By patterns of the device's name, the first that fits; NVIDIA's figures without sparsity, float32 accumulation."""


def limits_of(device: str) -> Limits | None:
    """The datasheet's, None for a device whose name is not known."""
    return next((limits for pattern, limits in _DATASHEETS if re.search(pattern, device)), None)


@dataclass(frozen=True)
class Row:
    """One case by one implementation.

    Attributes:
        dtype: what it computes in or writes, "bf16" or "e4m3".
        status: one of those above; `reason` says why it is not MEASURED.
        library: whether it is somebody else's kernel.
        rivals: name of the case whose libraries it is compared with.
        us, us_p10, us_p90: microseconds of a call, the median first.
        how: "graph" or "launches"; `note` says why not a graph.
        tflops, gbps: of the operations and the least traffic that the case needs, whatever is really done.
        compute_share, memory_share: of the datasheet's limits; `copy_share`: of the bandwidth of a copy.
        best_library: the fastest library of the case `rivals`; `ratio`: its time over this one's, 2 is twice as fast.
        checks: what was checked, as measured and allowed.
    """

    op: str
    case: str
    implementation: str
    dtype: str
    status: str
    reason: str | None = None
    library: bool = False
    rivals: str = ""
    flops: int | None = None
    bytes: int | None = None
    sets: int | None = None
    us: float | None = None
    us_p10: float | None = None
    us_p90: float | None = None
    how: str | None = None
    note: str | None = None
    tflops: float | None = None
    gbps: float | None = None
    compute_share: float | None = None
    memory_share: float | None = None
    copy_share: float | None = None
    best_library: str | None = None
    ratio: float | None = None
    checks: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether it counts as a kernel of this project: measured, and neither a library nor what it is checked by."""
        return self.us is not None and not self.library and self.implementation not in TRUTHS


def timed(row: Row, summary: Summary, limits: Limits | None, ceilings: Ceilings | None) -> Row:
    """The row with its time and what follows from that alone."""
    assert row.bytes is not None
    gbps = row.bytes / summary.median / 1e3
    tflops = None if row.flops is None else row.flops / summary.median / 1e6
    compute = None if limits is None else limits.e4m3 if row.dtype == "e4m3" else limits.bf16
    return replace(
        row,
        us=summary.median,
        us_p10=summary.p10,
        us_p90=summary.p90,
        tflops=tflops,
        gbps=gbps,
        compute_share=None if tflops is None or compute is None else tflops / compute,
        memory_share=None if limits is None else gbps / limits.memory,
        copy_share=None if ceilings is None else gbps / ceilings.copy_gbps,
    )


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows, each beside the fastest library of the case that it is compared with."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.op, row.case)
        if row.library and row.us is not None and (key not in best or row.us < (best[key].us or 0.0)):
            best[key] = row
    compared = []
    for row in rows:
        library = best.get((row.op, row.rivals or row.case))
        if library is not None and library.us is not None and row.us is not None:
            row = replace(row, best_library=library.implementation, ratio=library.us / row.us)
        compared.append(row)
    return compared


def fastest(rows: Sequence[Row], op: str) -> list[Row]:
    """The fastest of our rows for every case of an op, in the order of the cases."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.op == op and row.ours:
            before = found.get(row.case)
            if before is None or (row.us or 0.0) < (before.us or 0.0):
                found[row.case] = row
    return list(found.values())


def failures(rows: Sequence[Row]) -> list[str]:
    """What makes the command fail: wrong results, and own kernels that raised. Libraries may fail to run."""
    return [
        f"{row.op}, {row.case}, {row.implementation}: {row.status}: {row.reason}"
        for row in rows
        if row.status in (WRONG, UNCHECKED) or (row.status == FAILED and not row.library)
    ]
