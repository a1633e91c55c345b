"""Spans of the workers, and the timeline in a file."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from liveavatar_engine.errors import InputError, OutputError
from liveavatar_engine.pipeline.tpp.bubbles import bubbles, utilisation, warm_ups
from liveavatar_engine.pipeline.tpp.plan import Plan, StageCosts, make_plan
from liveavatar_engine.pipeline.tpp.trace import (
    COMPUTE,
    DECODE,
    KINDS,
    RECEIVE,
    SEND,
    NoTrace,
    Span,
    Tracer,
    read_chrome_trace,
    write_chrome_trace,
)

SPANS = [
    Span(0, COMPUTE, 10.0, 10.2, 0, 0, "steps"),
    Span(0, SEND, 10.2, 10.25, 0, 0),
    Span(1, RECEIVE, 10.22, 10.25, 0, 0),
    Span(0, COMPUTE, 10.2, 10.4, 0, 1),
    Span(1, DECODE, 10.25, 10.35, 0, 0),
    Span(0, SEND, 10.4, 10.45, 0, 1),
    Span(1, RECEIVE, 10.4, 10.45, 0, 1),
    Span(1, DECODE, 10.45, 10.55, 0, 1),
    Span(0, COMPUTE, 10.5, 10.55, -1, -1, "other work"),
]


@pytest.fixture
def plan() -> Plan:
    return make_plan(["cuda:0", "cuda:1"], 1, StageCosts.of(200, 100))


class TestTracer:
    def test_spans_of_a_clock(self) -> None:
        ticks = iter([1.0, 1.5])
        tracer = Tracer(3, clock=lambda: next(ticks))
        with tracer.span(COMPUTE, 0, 7, "steps 0-1"):
            pass
        tracer.add(SEND, 1.5, 1.75, 0, 7)
        assert tracer.drain() == [Span(3, COMPUTE, 1.0, 1.5, 0, 7, "steps 0-1"), Span(3, SEND, 1.5, 1.75, 0, 7)]
        assert tracer.drain() == []

    def test_a_body_that_raises_is_a_span_too(self) -> None:
        tracer = Tracer(0)
        with pytest.raises(RuntimeError, match="stop"), tracer.span(DECODE, 0, 1):
            raise RuntimeError("stop")
        assert [span.kind for span in tracer.drain()] == [DECODE]

    def test_it_keeps_the_newest(self) -> None:
        tracer = Tracer(0, limit=3)
        for block in range(5):
            tracer.add(COMPUTE, block, block + 1, 0, block)
        assert tracer.dropped == 2
        assert [span.block for span in tracer.drain()] == [2, 3, 4]

    def test_several_threads(self) -> None:
        tracer = Tracer(0)

        def work(session: int) -> None:
            for block in range(200):
                with tracer.span(COMPUTE, session, block):
                    pass

        threads = [threading.Thread(target=work, args=(session,)) for session in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = tracer.drain()
        assert {(span.session, span.block) for span in found} == {(s, b) for s in range(4) for b in range(200)}
        assert len(found) == 800

    def test_none_keeps_nothing(self) -> None:
        trace = NoTrace()
        with trace.span(COMPUTE, 0, 0):
            trace.add(SEND, 0.0, 1.0, 0, 0)
        assert trace.drain() == []


class TestTravel:
    def test_spans_travel_as_json(self) -> None:
        assert [Span.decode(json.loads(json.dumps(span.encode()))) for span in SPANS] == SPANS

    @pytest.mark.parametrize("values", [[], [0, "sleep", 0.0, 1.0, 0, 0, ""], [0, COMPUTE, 0.0]], ids=str)
    def test_what_is_no_span(self, values: list[object]) -> None:
        with pytest.raises(ValueError, match="a span is"):
            Span.decode(values)


class TestFile:
    def test_what_is_written_can_be_read(self, plan: Plan, tmp_path: Path) -> None:
        write_chrome_trace(tmp_path / "a.json", SPANS, plan)
        spans, labels = read_chrome_trace(tmp_path / "a.json")
        assert labels == {0: "rank 0 · step 0 · cuda:0", 1: "rank 1 · decode · cuda:1"}
        expected = sorted(SPANS, key=lambda span: (span.start, span.rank))
        assert [(s.rank, s.kind, s.session, s.block, s.name) for s in spans] == [
            (s.rank, s.kind, s.session, s.block, s.name) for s in expected
        ]
        assert [s.start for s in spans] == pytest.approx([s.start for s in expected], abs=2e-9)
        assert [s.end for s in spans] == pytest.approx([s.end for s in expected], abs=2e-9)
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

    def test_it_is_a_chrome_trace(self, plan: Plan, tmp_path: Path) -> None:
        write_chrome_trace(tmp_path / "a.json", SPANS, plan, "simulated")
        document = json.loads((tmp_path / "a.json").read_text())
        slices = [event for event in document["traceEvents"] if event["ph"] == "X"]
        assert len(slices) == len(SPANS)
        assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in slices)
        assert min(event["ts"] for event in slices) == 0
        assert (slices[0]["name"], slices[0]["dur"]) == ("steps, block 0", pytest.approx(200_000))
        assert slices[-1]["name"] == "other work"
        rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
        assert rows == {(span.rank, KINDS.index(span.kind)): span.kind for span in SPANS}
        assert document["otherData"]["note"] == "simulated"

    def test_arrows_lie_within_the_slices_that_they_join(self, plan: Plan, tmp_path: Path) -> None:
        write_chrome_trace(tmp_path / "a.json", SPANS, plan)
        events = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
        begins, ends = ([event for event in events if event["ph"] == phase] for phase in "sf")
        assert [(b["pid"], e["pid"], b["id"]) for b, e in zip(begins, ends, strict=True)] == [(0, 1, 0), (0, 1, 1)]
        for event in (*begins, *ends):
            assert any(
                slice_["pid"] == event["pid"]
                and slice_["tid"] == event["tid"]
                and slice_["ts"] <= event["ts"] < slice_["ts"] + slice_["dur"]
                for slice_ in events
                if slice_["ph"] == "X"
            )

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            (None, "No such file"),
            ("{", "Expecting property name"),
            ("[]", "expected a timeline that liveavatar-engine wrote"),
            ('{"traceEvents": []}', "expected a timeline that liveavatar-engine wrote"),
            (
                '{"otherData": {"schema": "liveavatar_engine.trace", "version": 1, "origin": 0}, "traceEvents": [{}]}',
                "damaged: KeyError 'ph'",
            ),
        ],
        ids=["missing", "no JSON", "list", "another tool's", "damaged"],
    )
    def test_a_file_that_is_none(self, text: str | None, complaint: str, tmp_path: Path) -> None:
        if text is not None:
            (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match="trace .*a.json: ") as error:
            read_chrome_trace(tmp_path / "a.json")
        assert complaint in str(error.value)

    def test_where_nothing_can_be_written(self, plan: Plan, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="does not exist"):
            write_chrome_trace(tmp_path / "no" / "a.json", SPANS, plan)
        assert list(tmp_path.iterdir()) == []


def test_a_pipeline_needs_no_media_library() -> None:
    """A machine that only computes has none."""
    code = (
        "import sys; import liveavatar_engine.pipeline.tpp.trace, liveavatar_engine.bench.layout;"
        "print([name for name in ('av', 'soxr', 'PIL', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


class TestBubbles:
    def test_utilisation(self) -> None:
        first, second = utilisation(SPANS)
        assert (first.rank, first.busy, first.seconds) == (0, pytest.approx(0.45), pytest.approx(0.55))
        assert second.share == pytest.approx(0.2 / 0.55)
        assert utilisation(SPANS, (10.2, 10.4))[0].share == pytest.approx(1.0)
        assert utilisation([]) == []
        assert [(rank.rank, rank.busy) for rank in utilisation(SPANS, ranks=(2,))] == [(2, 0)]

    def test_what_overlaps_counts_once(self) -> None:
        spans = [Span(0, COMPUTE, 0.0, 1.0, 0, 1), Span(0, DECODE, 0.5, 1.5, 0, 0), Span(0, SEND, 1.5, 2.0, 0, 0)]
        (found,) = utilisation(spans, (0.0, 2.0))
        assert found.busy == pytest.approx(1.5)
        assert [(gap.start, gap.end, gap.block) for gap in bubbles(spans, (0.0, 2.0))] == [(1.5, 2.0, -1)]

    def test_gaps_name_the_block_behind_them(self) -> None:
        found = [(gap.rank, round(gap.seconds, 6), gap.session, gap.block) for gap in bubbles(SPANS)]
        assert found == [(0, 0.1, -1, -1), (1, 0.25, 0, 0), (1, 0.1, 0, 1)]

    def test_warm_ups(self) -> None:
        later = [Span(0, COMPUTE, 11.0, 11.2, 0, 2)]
        assert warm_ups(SPANS, None) == pytest.approx((0.25, 0.0))
        assert warm_ups([*SPANS, *later], 2) == pytest.approx((0.25, 0.45))
        assert warm_ups([], 2) == (0.0, 0.0)
