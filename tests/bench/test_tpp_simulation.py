"""The simulated pipeline, against times worked out by hand."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liveavatar_engine.errors import ConfigError
from liveavatar_engine.pipeline.tpp.plan import Plan, StageCosts, make_plan
from liveavatar_engine.pipeline.tpp.simulate import BLOCK_SECONDS, FRAMES_PER_BLOCK, Simulation, simulate
from liveavatar_engine.pipeline.tpp.simulated_lane import FIRST_LATENT, PREFILL, Network
from liveavatar_engine.pipeline.tpp.trace import COMPUTE, DECODE, DELIVER, RECEIVE, SEND, WAIT

PAPER = StageCosts.of(110, 60)


def plan_of(count: int, steps: int, costs: StageCosts, **options: int) -> Plan:
    return make_plan([f"cuda:{index}" for index in range(count)], steps, costs, **options)


def times(found: Simulation, rank: int, *kinds: str) -> list[tuple[float, float, int, str]]:
    return [
        (span.start, span.end, span.block, span.name)
        for span in found.spans
        if span.rank == rank and span.kind in kinds
    ]


class TestByHand:
    def test_two_stages_and_three_blocks(self) -> None:
        costs = StageCosts(step=2.0, decode=1.0, first_decode=0.25, prefill=1.0, transfer=0.25)
        found = simulate(plan_of(2, 1, costs), costs, 3, update_after=None)
        assert times(found, 0, COMPUTE) == [(0.0, 2.0, 0, ""), (2.0, 4.0, 1, ""), (4.0, 6.0, 2, "")]
        assert times(found, 0, SEND) == [(2.0, 2.25, 0, ""), (4.0, 4.25, 1, ""), (6.0, 6.25, 2, "")]
        assert times(found, 1, RECEIVE) == times(found, 0, SEND)
        assert times(found, 1, DECODE) == [(2.25, 3.25, 0, ""), (4.25, 5.25, 1, ""), (6.25, 7.25, 2, "")]
        assert times(found, 1, WAIT) == [(0.0, 2.25, 0, ""), (3.25, 4.25, 1, ""), (5.25, 6.25, 2, "")]
        assert [block for *_, block, _ in times(found, 1, DELIVER)] == [0, 1, 2]
        assert found.delivered == ((3.25, 5.25, 7.25),)
        assert (found.first_frame, found.early_first_frame) == (3.25, 2.5)
        assert found.fps == pytest.approx(FRAMES_PER_BLOCK / 2.0)

    def test_the_sink_changes(self) -> None:
        costs = StageCosts(step=1.0, decode=1.0, first_decode=0.5, prefill=0.5, transfer=0.25)
        found = simulate(plan_of(3, 2, costs), costs, 2, update_after=1)
        assert times(found, 0, COMPUTE) == [(0.0, 1.0, 0, ""), (2.5, 3.0, 1, PREFILL), (3.0, 4.0, 1, "")]
        assert times(found, 1, COMPUTE) == [(1.25, 2.25, 0, ""), (2.75, 3.25, 1, PREFILL), (4.25, 5.25, 1, "")]
        assert (2.25, 2.5, 0, FIRST_LATENT) in times(found, 1, SEND)
        assert (2.25, 2.5, 0, FIRST_LATENT) in times(found, 0, RECEIVE)
        assert (2.5, 2.75, 0, FIRST_LATENT) in times(found, 0, SEND)
        assert found.warm_ups == (2.5, 1.5)

    def test_a_stage_with_other_work_prefills_as_late_as_it_can(self) -> None:
        costs = StageCosts(step=1.0, decode=0.5, first_decode=0.5, prefill=0.5)
        found = simulate(plan_of(3, 2, costs), costs, 4, update_after=3)
        expected = [(0.0, 1.0, 0, ""), (1.0, 2.0, 1, ""), (2.0, 3.0, 2, ""), (3.0, 3.5, 3, PREFILL), (3.5, 4.5, 3, "")]
        assert times(found, 0, COMPUTE) == expected
        assert [start for start, _, _, name in times(found, 1, COMPUTE) if name == PREFILL] == [4.0]
        assert found.delivered[0] == (2.5, 3.5, 4.5, 6.0)

    def test_a_slow_decoder_holds_the_stages_back(self) -> None:
        """Two blocks in its receive buffers, two in the send buffers, and then the stage itself waits."""
        costs = StageCosts(step=1.0, decode=3.0, first_decode=1.0, prefill=1.0)
        found = simulate(plan_of(2, 1, costs), costs, 5, sessions=2, update_after=None)
        assert [start for start, *_ in times(found, 0, COMPUTE)] == [0, 1, 2, 3, 4, 5, 7, 10, 13, 16]
        assert [span.session for span in found.spans if span.kind == DECODE] == [0, 1] * 5

    def test_a_session_has_only_so_many_blocks_on_their_way(self) -> None:
        costs = StageCosts(step=1.0, decode=3.0, first_decode=1.0, prefill=1.0)
        found = simulate(plan_of(2, 1, costs), costs, 6, update_after=None)
        assert [start for start, *_ in times(found, 0, COMPUTE)] == [0, 1, 2, 3, 4, 7]

    def test_one_device_does_all_in_turn(self) -> None:
        found = simulate(plan_of(1, 4, PAPER), PAPER, 5)
        names = [span.name or span.kind for span in found.spans if span.kind in (COMPUTE, DECODE)]
        assert names == [COMPUTE, DECODE] * 4 + [PREFILL, COMPUTE, DECODE]
        assert found.delivered[0] == pytest.approx((0.5, 1.0, 1.5, 2.0, 2.61))

    def test_mates_work_at_once(self) -> None:
        plan = plan_of(3, 4, PAPER, sequence_parallel=2)
        found = simulate(plan, PAPER, 3, update_after=1)
        assert times(found, 0, COMPUTE) == times(found, 1, COMPUTE)
        assert times(found, 0, COMPUTE)[0][1] == pytest.approx(0.22)
        assert times(found, 0, COMPUTE)[1] == (0.22, 0.275, 1, PREFILL)
        assert not times(found, 1, SEND)


class TestSteadyState:
    @pytest.mark.parametrize("update_after", [None, 1, 4])
    @pytest.mark.parametrize("count", range(1, 6))
    def test_it_is_the_bottleneck(self, count: int, update_after: int | None) -> None:
        plan = plan_of(count, 4, PAPER)
        found = simulate(plan, PAPER, 40, update_after=update_after)
        assert found.fps == pytest.approx(plan.fps(PAPER, FRAMES_PER_BLOCK))
        slowest = max(found.utilisation(), key=lambda rank: rank.share)
        assert slowest.share == pytest.approx(1.0, abs=0.02)

    @settings(max_examples=60, deadline=None)
    @given(
        count=st.integers(1, 8),
        steps=st.integers(1, 5),
        sessions=st.integers(1, 4),
        mates=st.integers(1, 2),
        costs=st.builds(StageCosts.of, st.integers(10, 90), st.integers(5, 200), st.integers(0, 3)),
        update_after=st.none() | st.integers(1, 6),
    )
    def test_of_any_layout(
        self, count: int, steps: int, sessions: int, mates: int, costs: StageCosts, update_after: int | None
    ) -> None:
        try:
            plan = plan_of(count, steps, costs, sequence_parallel=mates, max_sessions=sessions)
        except ConfigError:
            return
        found = simulate(plan, costs, 60, sessions=sessions, update_after=update_after)
        predicted = plan.fps(costs, FRAMES_PER_BLOCK, sessions)
        evenly = all(
            sessions % (len(plan.lanes) * len(lane.decoders)) == 0 for lane in plan.lanes if lane.decodes_apart
        )
        most = predicted if evenly or sessions == 1 else plan.fps(costs, FRAMES_PER_BLOCK)
        assert 0.97 * predicted < found.fps < 1.03 * most
        assert all(len(delivered) == 60 for delivered in found.delivered)
        assert all(list(delivered) == sorted(delivered) for delivered in found.delivered)
        for rank in plan.ranks:
            busy = times(found, rank.rank, COMPUTE, DECODE)
            assert all(second[0] >= first[1] for first, second in itertools.pairwise(busy))

    def test_several_decoders(self) -> None:
        costs = StageCosts.of(50, 190)
        plan = plan_of(6, 4, costs, max_sessions=2)
        assert simulate(plan, costs, 40, sessions=2).fps == pytest.approx(FRAMES_PER_BLOCK / 0.095)
        alone = simulate(plan, costs, 40)
        assert alone.fps == pytest.approx(FRAMES_PER_BLOCK / 0.19)
        assert alone.utilisation()[-1].busy == 0, "a session has one decoder"

    def test_the_same_again(self) -> None:
        plan = plan_of(7, 4, PAPER, max_sessions=3)
        assert simulate(plan, PAPER, 20, sessions=3) == simulate(plan, PAPER, 20, sessions=3)


class TestFirstFrame:
    @pytest.mark.parametrize("count", range(1, 6))
    def test_a_pipeline_does_not_slow_the_first_block(self, count: int) -> None:
        costs = StageCosts.of(110, 60, 2)
        plan = plan_of(count, 4, costs)
        found = simulate(plan, costs, 8)
        lane = plan.lanes[0]
        assert found.first_frame == pytest.approx(0.5 + (count - 1) * 0.002)
        assert found.first_frame == pytest.approx(lane.first_frame(costs))
        assert found.early_first_frame == pytest.approx(lane.first_frame(costs, early=True))

    @pytest.mark.parametrize("update_after", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("count", range(2, 6))
    def test_the_second_warm_up_is_at_most_one_pipeline_depth(self, count: int, update_after: int) -> None:
        """What no bottleneck further down would have cost anyway, and no prefill."""
        costs = StageCosts.of(110, 60, 3)
        plan = plan_of(count, 4, costs)
        found = simulate(plan, costs, 12, update_after=update_after)
        depth = sum(plan.lanes[0].seconds(costs)) + count * costs.transfer
        assert 0 <= found.warm_ups.second <= depth
        if update_after == 1:
            assert found.warm_ups.second > 0.1

    def test_a_sink_that_changes_late_enough_costs_only_its_transfer(self) -> None:
        costs = StageCosts.of(110, 60, 3)
        found = simulate(plan_of(5, 4, costs), costs, 12, update_after=4)
        assert found.warm_ups.second == pytest.approx(4 * 0.003)


class TestPace:
    @pytest.mark.parametrize("count", [2, 3, 4, 5])
    def test_sessions_in_real_time(self, count: int) -> None:
        """As many as are promised keep up, one more falls behind."""
        plan = plan_of(count, 4, PAPER)
        most = simulate(plan, PAPER, 1).real_time_sessions
        assert most == int(BLOCK_SECONDS / plan.bottleneck(PAPER))

        def lag(sessions: int) -> float:
            found = simulate(plan, PAPER, 60, sessions=sessions, paced=True)
            return max(times[-1] - times[19] - 40 * BLOCK_SECONDS for times in found.delivered)

        assert lag(most) < 0.01
        assert lag(most + 1) > 1.0

    def test_a_block_waits_for_its_audio(self) -> None:
        found = simulate(plan_of(5, 4, PAPER), PAPER, 5, update_after=None, paced=True)
        begun = [start for start, *_ in times(found, 0, COMPUTE)]
        assert begun == pytest.approx([block * BLOCK_SECONDS for block in range(5)])


class TestNodes:
    def test_transfers_between_machines(self) -> None:
        costs = StageCosts.of(100, 50, 1)
        plan = plan_of(5, 4, costs)
        found = simulate(plan, costs, 3, network=Network(2, 0.02))
        assert found.first_frame == pytest.approx(0.45 + 2 * 0.001 + 2 * 0.02)
        assert [round(end - start, 6) for start, end, block, name in times(found, 1, SEND) if not name] == [0.02] * 3
        back = [(s.rank, round(s.seconds, 6)) for s in found.spans if s.name == FIRST_LATENT and s.kind == RECEIVE]
        assert back == [(0, 0.02), (1, 0.001), (2, 0.02), (3, 0.001)], "to the first stage, and down the pipeline"

    def test_a_slow_network_is_the_bottleneck(self) -> None:
        costs = StageCosts.of(100, 50)
        found = simulate(plan_of(5, 4, costs), costs, 40, network=Network(4, 0.3))
        assert found.fps == pytest.approx(FRAMES_PER_BLOCK / 0.3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"sessions": 0}, "sessions must be at least 1"),
        ({"update_after": 0}, "update_after must be at least 1"),
    ],
    ids=["blocks", "sessions", "update_after"],
)
def test_what_cannot_be_simulated(options: dict[str, int], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        simulate(plan_of(1, 4, PAPER), PAPER, **{"blocks": 2, **options})


@pytest.mark.parametrize("network", [(0, None), (2, -1.0)], ids=str)
def test_networks_that_cannot_be(network: tuple[int, float | None]) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        Network(*network)
