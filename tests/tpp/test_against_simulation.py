"""What the simulator predicts of a pipeline is what the pipeline does, with stages that sleep."""

from itertools import pairwise

import pytest
from pipelines import Beats, pipeline, session

from liveavatar_engine.pipeline.tpp.bubbles import warm_ups
from liveavatar_engine.pipeline.tpp.plan import StageCosts
from liveavatar_engine.pipeline.tpp.simulate import Simulation, simulate
from liveavatar_engine.pipeline.tpp.trace import COMPUTE, DECODE, Span

pytestmark = pytest.mark.alone
CLOSE = 0.1
"""How far a time may be from the prediction, over it."""
BLOCKS = 20


def run(devices: int, costs: StageCosts, update_after: int, threads: bool) -> tuple[list[Span], Simulation]:
    with pipeline(devices, costs, threads=threads, trace=True) as runner:
        assert len(list(session(runner, Beats(BLOCKS), update_after=update_after))) == BLOCKS
        return runner.spans(), simulate(runner.plan, costs, BLOCKS, update_after=update_after)


def decoded(spans: list[Span]) -> list[float]:
    """When each block was decoded, in seconds from the first work on the stream."""
    start = min(span.start for span in spans if span.kind == COMPUTE)
    return [span.end - start for span in sorted(spans, key=lambda span: span.end) if span.kind == DECODE]


@pytest.mark.parametrize(
    ("devices", "step", "decode", "update_after", "threads"),
    [(2, 40, 22, 4, True), (3, 40, 22, 1, True), (3, 20, 90, 4, True), (4, 40, 22, 4, True), (5, 60, 33, 1, False)],
    ids=["2", "3, early sink", "3, slow decoder", "4", "5 processes"],
)
def test_times_are_as_predicted(devices: int, step: int, decode: int, update_after: int, threads: bool) -> None:
    costs = StageCosts.of(step, decode)
    spans, predicted = run(devices, costs, update_after, threads)
    times, expected = decoded(spans), predicted.delivered[0]
    assert len(times) == BLOCKS
    assert times[0] == pytest.approx(expected[0], rel=CLOSE), "the first frame"
    assert times[-1] == pytest.approx(expected[-1], rel=CLOSE), "with both warm-ups"
    half = BLOCKS // 2
    assert times[-1] - times[half] == pytest.approx(expected[-1] - expected[half], rel=CLOSE), "the steady state"
    assert all(later > earlier for earlier, later in pairwise(times))
    assert (times[-1] - times[half]) / (BLOCKS - 1 - half) < predicted.plan.bottleneck(costs) / 0.95


def test_a_prefill_is_work_and_the_second_warm_up_is_as_predicted() -> None:
    spans, predicted = run(3, StageCosts.of(40, 22), 1, threads=True)
    prefills = sorted((span.rank, span.kind, span.block) for span in spans if span.name == "prefill")
    assert prefills == [(0, COMPUTE, 1), (1, COMPUTE, 1)], "stages that have nothing else to do"
    measured, expected = warm_ups(spans, 1), predicted.warm_ups
    assert measured.second == pytest.approx(expected.second, rel=CLOSE)
