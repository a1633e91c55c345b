"""How kernels are checked and timed, without a GPU: the clock is a fake."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from liveavatar_kernels.model_sizes import WAN_14B
from support import CPU

from liveavatar_engine.bench.kernels import rows, subjects, timing
from liveavatar_engine.bench.kernels.checks import Error, Finding, Outputs, duplicate, poisoned_memory
from liveavatar_engine.bench.kernels.rows import failures
from liveavatar_engine.bench.kernels.runner import Conditions, run_case
from liveavatar_engine.bench.kernels.subjects import ONE_BUFFER, SUBJECTS, Subject
from liveavatar_engine.bench.kernels.timing import Ceilings, Launcher, Summary, launcher, measure, sets_beyond_cache

DENSE = subjects.RING_ATTENTION.cases[0]
E4M3 = next(case for case in subjects.RING_ATTENTION.cases if case.quantized)


class FakeClock:
    """Every run takes `us`, whatever it does."""

    def __init__(self, us: float = 10_000.0, captures: bool = True, syncs: bool = False) -> None:
        self.us, self.captures, self.syncs, self.runs = us, captures, syncs, 0

    def times(self, body: Callable[[], object], repeats: int) -> list[float]:
        body()
        self.runs += repeats
        return [self.us] * repeats

    def capture(self, body: Callable[[], object]) -> Callable[[], object]:
        if not self.captures:
            raise RuntimeError("no\nsecond line")
        return body

    def reads_the_device(self, body: Callable[[], object]) -> bool:
        body()
        return self.syncs


def conditions(*implementations: str, **changes: Any) -> Conditions:
    clock = changes.pop("clock", FakeClock())
    return Conditions(CPU, clock, 1, 1, implementations=implementations, **changes)


class TestChecks:
    @pytest.fixture(params=[(s, c) for s in SUBJECTS for c in (s.cases[0], s.cases[-1])], ids=lambda p: p[0].name)
    def right(self, request: pytest.FixtureRequest) -> tuple[Any, Outputs]:
        """A judge, and a right result."""
        subject, case = request.param
        arguments = subject.arguments(case, torch.bfloat16, CPU, 3)
        return subject.judge(case, arguments), subject.run(case, duplicate(arguments), "reference")

    @staticmethod
    def changed(outputs: Outputs, number: int, change: Callable[[torch.Tensor], None]) -> Outputs:
        copies = duplicate(outputs)
        wide = copies[number].float()
        change(wide)
        copies[number].copy_(wide)
        return copies

    def test_a_right_result_passes(self, right: tuple[Any, Outputs]) -> None:
        judge, outputs = right
        findings = judge("reference", outputs)
        assert findings
        assert [str(finding) for finding in findings if not finding.passes] == []

    def test_what_nobody_wrote_fails(self, right: tuple[Any, Outputs]) -> None:
        judge, outputs = right
        for number, output in enumerate(outputs):
            findings = judge("reference", self.changed(outputs, number, lambda x: x.fill_(float("nan"))))
            assert not all(finding.passes for finding in findings), f"output {number}, {list(output.shape)}"

    def test_a_single_wrong_row_fails(self, right: tuple[Any, Outputs]) -> None:
        judge, outputs = right

        def spoil(x: torch.Tensor) -> None:
            x.view(-1, x.shape[-1])[-1].nan_to_num_(1.0).mul_(1.5).add_(1.0)

        for number, output in enumerate(outputs):
            findings = judge("reference", self.changed(outputs, number, spoil))
            assert not all(finding.passes for finding in findings), f"output {number}, {list(output.shape)}"

    def test_a_slightly_wrong_row_of_many_is_seen(self) -> None:
        exact = torch.randn(100_000, 16, generator=torch.Generator().manual_seed(0))
        ours = exact.clone()
        ours[77] += 0.5
        error = Error.of(ours, exact)
        assert error.total < 2e-3
        assert error.worst > 0.1

    def test_an_error_is_never_nothing(self) -> None:
        assert Error.of(torch.zeros(3), torch.zeros(4)).total == float("inf")
        assert Error.of(torch.ones(2, 2), torch.zeros(2, 2)).total == float("inf")
        assert Error.of(torch.zeros(2, 2), torch.zeros(2, 2)) == (0.0, 0.0)
        assert not Finding("", Error.of(torch.tensor([float("nan")]), torch.ones(1)).total, 1e9).passes
        assert not Finding("", float("nan"), 1.0, at_least=True).passes
        assert str(Finding("result: dB", 12.0, 25.0, at_least=True)) == "result: dB: 12, allowed from 25"

    def test_copies_keep_strides_and_shared_memory(self) -> None:
        fused = torch.arange(24.0).view(4, 6)
        first, (second, nothing) = duplicate((fused[:, :2], (fused[:, 2:], None)))
        assert nothing is None
        assert first.stride() == (6, 1)
        first[0, 0] = 7.0
        assert second.untyped_storage()[0] == first.untyped_storage()[0]
        assert fused[0, 0] == 0.0

    def test_poison_ends_where_it_should(self) -> None:
        real = torch.empty
        with poisoned_memory():
            assert torch.empty is not real
            assert torch.zeros(1).new_empty(3).isnan().all()
        assert torch.empty is real


class TestTiming:
    def test_calls_take_turns_in_a_graph_that_is_long_enough(self) -> None:
        called = []
        clock = FakeClock(us=200.0)
        one = launcher([lambda: called.append(0), lambda: called.append(1)], clock)
        called.clear()
        one.body()
        assert called == [0, 1] * 10, "2,000 us of turns that take 200"
        assert (one.calls, one.how, one.why) == (20, "graph", None)

    def test_what_cannot_be_captured_is_launched(self) -> None:
        one = launcher([lambda: None], FakeClock(captures=False))
        assert (one.how, one.why) == ("launches", "capture failed: RuntimeError: no")
        one = launcher([lambda: None], FakeClock(syncs=True))
        assert (one.how, one.why) == ("launches", "it reads device values on the host")

    def test_times_are_those_of_one_call(self) -> None:
        clock = FakeClock(us=300.0)
        assert measure([Launcher(lambda: None, 3, "graph")] * 2, 50, clock) == [Summary(100.0, 100.0, 100.0)] * 2
        assert clock.runs >= 100
        assert measure([], 50, clock) == []

    def test_median_and_spread(self) -> None:
        assert Summary.of([float(x) for x in range(101)]) == (50.0, 10.0, 90.0)

    def test_sets_do_not_fit_in_the_cache(self) -> None:
        assert sets_beyond_cache(400 << 20, 50 << 20) == 1
        assert sets_beyond_cache(52 << 20, 60 << 20) == 5
        assert sets_beyond_cache(1, 50 << 20) == timing._MOST_SETS

    def test_ceilings(self) -> None:
        found = timing.measure_ceilings(CPU, FakeClock(us=1.0), 5, copy_bytes=2_000_000, side=100)
        assert found == Ceilings(copy_gbps=2000.0, matmul_tflops=2.0, e4m3_tflops=None, dtype="fp32")

    def test_a_cpu_has_a_clock_of_its_own(self) -> None:
        clock, calls = timing.clock_of(CPU), []
        assert len(clock.times(lambda: calls.append(0), 3)) == len(calls) == 3
        assert min(clock.times(lambda: torch.randn(64, 64).exp(), 3)) > 0
        assert not clock.reads_the_device(lambda: calls.append(0))
        with pytest.raises(RuntimeError, match="a CPU has no graphs"):
            clock.capture(lambda: None)


class TestRunner:
    def test_every_implementation_has_a_row(self) -> None:
        found = {one.implementation: one for one in run_case(subjects.RING_ATTENTION, DENSE, conditions("sdpa", "fa3"))}
        for name in ("sdpa", "sdpa" + ONE_BUFFER):
            assert found[name].status == rows.MEASURED
            assert found[name].library
            assert found[name].how == "graph"
            assert found[name].us is not None
            assert found[name].checks
        assert (found["fa3"].status, found["fa3"].reason) == (rows.ABSENT, "needs a CUDA device")
        assert found["triton"].reason == "not among --implementations"
        assert {one.name for one in subjects.RING_ATTENTION.op.implementations} <= set(found)
        assert failures(list(found.values())) == []

    def test_truths_are_not_timed_unasked(self) -> None:
        (found,) = (
            one
            for one in run_case(subjects.CHANNEL_NORM, subjects.CHANNEL_NORM.cases[0], conditions())
            if one.implementation == "reference"
        )
        assert (found.status, found.us) == (rows.SKIPPED, None)

    @pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
    def test_every_op_runs(self, subject: Subject) -> None:
        case = subject.cases[0]
        found = {one.implementation: one for one in run_case(subject, case, conditions("reference"))}
        assert found["reference"].status == rows.MEASURED, found["reference"].reason
        assert found["reference"].gbps == pytest.approx(subject.bytes(case) / found["reference"].us / 1e3)
        assert found["reference"].dtype == subject.dtype(case)

    def test_no_library_for_e4m3_attention(self) -> None:
        found = {one.implementation: one for one in run_case(subjects.RING_ATTENTION, E4M3, conditions("sdpa"))}
        assert found["sdpa"].status == rows.MEASURED, "a small case is its own rival"
        large = next(case for case in subjects.RING_ATTENTION.model_cases(WAN_14B) if case.quantized)
        assert subjects.RING_ATTENTION.rivals(large) == "3168 tokens"
        found = {one.implementation: one for one in run_case(subjects.RING_ATTENTION, large, conditions("sdpa"))}
        assert found["sdpa"].status == rows.SKIPPED
        assert "measured as '3168 tokens'" in found["sdpa"].reason

    @pytest.mark.parametrize(
        ("change", "status"),
        [
            (lambda out: out * 1.05, rows.WRONG),
            (lambda out: torch.empty_like(out), rows.WRONG),
            (lambda out: out[:, :1], rows.WRONG),
            (lambda out: 1 / 0, rows.FAILED),
        ],
        ids=["wrong", "unwritten", "shape", "raises"],
    )
    def test_what_is_wrong_gets_no_time(self, change: Callable[[torch.Tensor], Any], status: str) -> None:
        real = subjects.CHANNEL_NORM
        broken = dataclasses.replace(real, run=lambda *given: (change(real.run(*given)[0]),))
        clock = FakeClock()
        found = run_case(broken, real.cases[0], conditions("reference", clock=clock))
        (one,) = (one for one in found if one.implementation == "reference")
        assert (one.status, one.us, one.ratio) == (status, None, None)
        assert clock.runs == 0
        (sentence,) = failures(found)
        assert sentence.startswith("channel_norm, 2x3x17 positions of 96, alone, reference: ")

    def test_what_cannot_be_checked_gets_no_time(self) -> None:
        def judge(*_: Any) -> Any:
            raise RuntimeError("out of memory")

        broken = dataclasses.replace(subjects.CHANNEL_NORM, judge=judge)
        found = run_case(broken, broken.cases[0], conditions("reference"))
        (sentence,) = failures(found)
        assert sentence.endswith("unchecked: the reference or the yardstick failed: RuntimeError: out of memory")

    def test_each_check_starts_with_a_cache_that_nobody_wrote(self) -> None:
        """What an implementation left in a cache must not pass for the work of the next."""
        real = subjects.RING_WRITE
        calls = []

        def lazy(case: Any, arguments: Any, implementation: str | None) -> Outputs:
            calls.append(1)
            assert arguments["cache"].k.isnan().all() or len(calls) > 1
            return real.run(case, arguments, implementation)

        found = run_case(dataclasses.replace(real, run=lazy), real.cases[0], conditions("reference"))
        assert next(one for one in found if one.implementation == "reference").status == rows.MEASURED

    @pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs in the interpreter only without a GPU")
    def test_refusals_are_rows(self) -> None:
        import interpreter  # noqa: F401

        found = run_case(subjects.CHANNEL_NORM, subjects.CHANNEL_NORM.cases[3], conditions("triton"))
        assert next(one for one in found if one.implementation == "triton").status == rows.MEASURED
        double = conditions("triton", dtype=torch.float64)
        found = run_case(subjects.CHANNEL_NORM, subjects.CHANNEL_NORM.cases[3], double)
        (refused,) = (one for one in found if one.implementation == "triton")
        assert refused.status == rows.REFUSED
        assert "no float64" in str(refused.reason)
