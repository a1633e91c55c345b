"""Which device does what: every layout that a user can ask for."""

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liveavatar_engine.errors import ConfigError
from liveavatar_engine.pipeline.tpp.plan import Plan, StageCosts, make_plan

PAPER = StageCosts.of(110, 60)
DEAR_DECODER = StageCosts.of(50, 190)


def devices(count: int) -> list[str]:
    return [f"cuda:{index}" for index in range(count)]


def stages(plan: Plan) -> list[list[str]]:
    return [[rank.stage for rank in lane.ranks] for lane in plan.lanes]


def compositions(steps: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut steps into parts of at least one."""
    for cuts in itertools.combinations(range(1, steps), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, steps)))


def bottlenecks(count: int, steps: int, costs: StageCosts) -> Iterator[float]:
    """Of every lane of one session that uses all devices."""
    for split in compositions(steps, count - 1) if count > 1 else ():
        yield max(*(n * costs.step for n in split), costs.decode)
    for split in compositions(steps, count):
        yield max(*(n * costs.step for n in split), split[-1] * costs.step + costs.decode)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, ["steps 0-3 + decode"]),
        (2, ["steps 0-1", "steps 2-3 + decode"]),
        (3, ["steps 0-1", "steps 2-3", "decode"]),
        (4, ["step 0", "step 1", "step 2", "step 3 + decode"]),
        (5, ["step 0", "step 1", "step 2", "step 3", "decode"]),
    ],
)
def test_a_lane_of_the_papers_costs(count: int, expected: list[str]) -> None:
    plan = make_plan(devices(count), 4, PAPER)
    assert stages(plan) == [expected]
    assert [rank.device for rank in plan.ranks] == devices(count)
    assert plan.lanes[0].depth == count


def test_a_dear_decoder_leaves_fewer_steps_to_its_stage() -> None:
    costs = StageCosts.of(100, 300)
    assert stages(make_plan(devices(2), 5, costs)) == [["steps 0-3", "step 4 + decode"]]
    assert make_plan(devices(2), 5, costs).bottleneck(costs) == pytest.approx(0.4)


def test_where_both_are_alike_the_decoder_is_alone() -> None:
    plan = make_plan(devices(3), 4, StageCosts.of(100, 100))
    assert stages(plan) == [["steps 0-1", "steps 2-3", "decode"]]
    assert plan.lanes[0].decodes_apart


def test_mates_share_steps_and_the_first_of_the_last_decodes() -> None:
    plan = make_plan(devices(4), 4, PAPER, sequence_parallel=2)
    assert stages(plan) == [["steps 0-2 (1 of 2)", "steps 0-2 (2 of 2)", "step 3 + decode (1 of 2)", "step 3 (2 of 2)"]]
    assert plan.bottleneck(PAPER) == pytest.approx(3 * 0.055)
    apart = make_plan(devices(9), 4, PAPER, sequence_parallel=2)
    assert (apart.lanes[0].depth, apart.lanes[0].decoders[0].rank) == (5, 8)
    assert apart.bottleneck(PAPER) == pytest.approx(0.06)


def test_more_devices_than_a_lane_can_use_serve_other_sessions() -> None:
    paper = ["step 0", "step 1", "step 2", "step 3", "decode"]
    assert stages(make_plan(devices(10), 4, PAPER, max_sessions=4)) == [paper, paper]
    assert stages(make_plan(devices(7), 4, PAPER, max_sessions=2)) == [paper, ["steps 0-1", "steps 2-3 + decode"]]
    assert stages(make_plan(devices(5), 4, PAPER, max_sessions=5)) == [paper], "one lane can use them all"


def test_several_decoders_where_decoding_is_the_bottleneck() -> None:
    plan = make_plan(devices(6), 4, DEAR_DECODER, max_sessions=2)
    assert stages(plan) == [["step 0", "step 1", "step 2", "step 3", "decode", "decode"]]
    assert [rank.decoder for rank in plan.ranks] == [None] * 4 + [0, 1]
    assert plan.bottleneck(DEAR_DECODER) == pytest.approx(0.095)
    assert plan.fps(DEAR_DECODER, 12) == pytest.approx(12 / 0.095)
    assert plan.fps(DEAR_DECODER, 12, sessions=1) == pytest.approx(12 / 0.19), "a session has one decoder"


def test_what_is_predicted() -> None:
    plan = make_plan(devices(5), 4, PAPER)
    assert plan.fps(PAPER, 12) == pytest.approx(12 / 0.11)
    assert plan.lanes[0].seconds(PAPER) == pytest.approx((0.11, 0.11, 0.11, 0.11, 0.06))
    assert plan.lanes[0].first_frame(PAPER) == pytest.approx(0.5)
    assert plan.lanes[0].first_frame(PAPER, early=True) == pytest.approx(0.46)
    slow = StageCosts.of(110, 60, transfer_ms=200)
    assert make_plan(devices(5), 4, slow).bottleneck(slow) == pytest.approx(0.2)
    two = make_plan(devices(7), 4, PAPER, max_sessions=2)
    assert two.fps(PAPER, 12, sessions=1) == pytest.approx(12 / 0.11), "the second lane has no session"
    assert two.bottleneck(PAPER) == pytest.approx(0.28), "of the slower lane"


@pytest.mark.parametrize(
    ("count", "options", "complaint"),
    [
        (0, {}, "0 devices are too few"),
        (2, {"sequence_parallel": 3}, "2 devices are too few: sequence_parallel=3 needs at least 3"),
        (6, {}, "cuda:5 would have nothing to do. Give 5 devices or max_sessions=2 or sequence_parallel=2"),
        (11, {"max_sessions": 2}, "cuda:10 would have nothing to do. Give 10 devices or max_sessions=3 or"),
        (5, {"sequence_parallel": 3}, "cuda:4 would have nothing to do. Give 4 devices or sequence_parallel=2"),
        (2, {"max_sessions": 0}, "max_sessions must be at least 1"),
    ],
    ids=["none", "mates", "one too many", "two sessions", "mates left over", "no session"],
)
def test_no_device_is_left_idle_silently(count: int, options: dict[str, int], complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_plan(devices(count), 4, PAPER, **options)
    assert complaint in str(error.value)


def test_a_device_has_one_worker() -> None:
    with pytest.raises(ConfigError, match="named more than once: cuda:1"):
        make_plan(["cuda:0", "cuda:1", "cuda:1"], 4, PAPER)


@pytest.mark.parametrize("name", ["step", "decode", "first_decode", "prefill", "transfer"])
def test_costs_are_seconds(name: str) -> None:
    values = {"step": 0.1, "decode": 0.1, "first_decode": 0.1, "prefill": 0.1, "transfer": 0.0, name: -0.1}
    with pytest.raises(ConfigError, match=f"cost of {name}: expected .* seconds, not -0.1"):
        StageCosts(**values)


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 12),
    steps=st.integers(1, 6),
    mates=st.integers(1, 3),
    sessions=st.integers(1, 4),
    step=st.integers(1, 200),
    decode=st.integers(1, 400),
)
def test_every_plan_is_whole(count: int, steps: int, mates: int, sessions: int, step: int, decode: int) -> None:
    costs = StageCosts.of(step, decode)
    try:
        plan = make_plan(devices(count), steps, costs, sequence_parallel=mates, max_sessions=sessions)
    except ConfigError:
        assert count < mates or count > 1, "a device alone is a plan"
        return
    assert [(rank.rank, rank.device) for rank in plan.ranks] == list(enumerate(devices(count)))
    assert sum(len(lane.decoders) if lane.decodes_apart else 1 for lane in plan.lanes) <= sessions
    for number, lane in enumerate(plan.lanes):
        assert all(rank.lane == number for rank in lane.ranks)
        assert [step for stage in lane.stages for step in stage[0].steps] == list(range(steps))
        assert [rank.decoder for rank in lane.decoders] == list(range(len(lane.decoders)))
        for stage in lane.stages:
            assert [rank.mate for rank in stage] == list(range(mates))
            assert len({rank.steps for rank in stage}) == 1
            assert all(rank.mates == mates for rank in stage)


@settings(max_examples=150, deadline=None)
@given(count=st.integers(1, 7), steps=st.integers(1, 6), step=st.integers(1, 60), decode=st.integers(1, 200))
def test_no_other_lane_is_faster(count: int, steps: int, step: int, decode: int) -> None:
    costs = StageCosts.of(step, decode)
    least = min(bottlenecks(count, steps, costs), default=None)
    if least is None:
        with pytest.raises(ConfigError, match="nothing to do"):
            make_plan(devices(count), steps, costs)
    else:
        assert make_plan(devices(count), steps, costs).bottleneck(costs) == pytest.approx(least)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 9), steps=st.integers(1, 4), step=st.integers(1, 60), decode=st.integers(1, 60))
def test_no_other_pair_of_lanes_makes_more(count: int, steps: int, step: int, decode: int) -> None:
    costs = StageCosts.of(step, decode)
    try:
        plan = make_plan(devices(count), steps, costs, max_sessions=2)
    except ConfigError:
        assert count > 2 * (steps + 1)
        return
    if len(plan.lanes) == 1:
        alone = min(bottlenecks(count, steps, costs), default=math.inf)
        assert plan.bottleneck(costs) < alone * (1 + 1e-9), "several decoders or not"
        return
    pairs = (
        1 / first + 1 / second
        for size in range(1, count)
        for first in bottlenecks(size, steps, costs)
        for second in bottlenecks(count - size, steps, costs)
    )
    assert plan.fps(costs, 1) == pytest.approx(max(pairs))
