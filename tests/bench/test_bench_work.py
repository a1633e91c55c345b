"""Operations against sums done by hand for the 14B model, and shares of limits."""

import pytest

from liveavatar_engine.bench import work
from liveavatar_engine.bench.kernels.rows import Limits
from liveavatar_engine.bench.kernels.timing import Ceilings
from liveavatar_engine.config import StreamGeometry
from liveavatar_engine.weights.presets import PRESETS

PRESET = PRESETS["14b"]
TOKENS, DIM, FFN, LAYERS, INJECTORS = 3168, 5120, 13824, 40, 12


@pytest.fixture(scope="module")
def geometry() -> StreamGeometry:
    return StreamGeometry(PRESET.model, 384, 704)


def test_a_step_of_the_14b_model(geometry: StreamGeometry) -> None:
    found = work.step_work(geometry, text_keys=512)
    linears = sum(found[name].flops for name in work.LINEARS)
    assert linears == 2 * TOKENS * (6 * DIM * DIM + 2 * DIM * FFN) * LAYERS
    assert linears / 1e12 == pytest.approx(75.7, abs=0.05)
    assert found[work.RING_ATTENTION].flops == 4 * TOKENS * (12672 + 2640) * DIM * LAYERS
    assert found[work.RING_ATTENTION].flops / 1e12 == pytest.approx(39.7, abs=0.05)
    assert found[work.TEXT_ATTENTION].flops / 1e12 == pytest.approx(1.3, abs=0.05)
    assert found[work.AUDIO_INJECTION].flops == 4 * TOKENS * DIM * (DIM + 5) * INJECTORS
    assert found[work.AUDIO_INJECTION].flops / 1e12 == pytest.approx(4.0, abs=0.05)
    assert work.total(found) / 1e12 == pytest.approx(75.7 + 4.0 + 39.7 + 1.3, abs=0.2)
    assert set(found) == set(work.STEP_STAGES)


def test_two_actors_and_a_short_prompt(geometry: StreamGeometry) -> None:
    one, two = (work.step_work(geometry, 101, actors) for actors in (1, 2))
    assert two[work.AUDIO_INJECTION].flops == 2 * one[work.AUDIO_INJECTION].flops
    assert one[work.TEXT_ATTENTION].flops == 4 * TOKENS * 101 * DIM * LAYERS


def test_bytes_by_hand(geometry: StreamGeometry) -> None:
    found = work.step_work(geometry, 512, widths=work.Widths(activation=2, weight=1, cache=1))
    assert found[work.ATTENTION_OUTPUT].bytes == LAYERS * (DIM * (DIM + TOKENS) + 2 * TOKENS * DIM)
    assert found[work.RING_ATTENTION].bytes == LAYERS * DIM * (2 * 2 * TOKENS + 2 * (12672 + 2640))
    assert found[work.RING_WRITE].bytes == LAYERS * TOKENS * DIM * (3 * 2 + 2 + 2)
    assert found[work.QUANTISE].bytes == LAYERS * TOKENS * (2 * DIM + FFN) * 3
    assert found[work.QKV].e4m3
    assert found[work.RING_ATTENTION].e4m3
    assert not found[work.TEXT_ATTENTION].e4m3
    assert work.step_work(geometry, 512)[work.QUANTISE].bytes == 0


def test_a_block_of_the_vae(geometry: StreamGeometry) -> None:
    assert work.decode_flops(PRESET.vae, geometry) / 1e12 == pytest.approx(27.4, abs=0.1)


class TestShares:
    LIMITS = Limits(bf16=1000.0, e4m3=2000.0, memory=4000.0)
    CEILINGS = Ceilings(copy_gbps=3000.0, matmul_tflops=800.0, e4m3_tflops=None)

    def test_products_are_held_against_products(self) -> None:
        found = work.stage("x", 2.0, 1.0, work.Work(1e12, 1e6), self.LIMITS, self.CEILINGS)
        assert (found.tflops, found.gbps) == (pytest.approx(500.0), pytest.approx(0.5))
        assert (found.datasheet, found.measured) == (pytest.approx(0.5), pytest.approx(0.625))

    def test_memory_counts_where_it_takes_longer(self) -> None:
        found = work.stage("x", 2.0, 1.0, work.Work(0.0, 4e9), self.LIMITS, self.CEILINGS)
        assert (found.tflops, found.gbps) == (None, pytest.approx(2000.0))
        assert (found.datasheet, found.measured) == (pytest.approx(0.5), pytest.approx(2 / 3))

    def test_e4m3_has_limits_of_its_own(self) -> None:
        found = work.stage("x", 1.0, 1.0, work.Work(1e12, 1.0, e4m3=True), self.LIMITS, self.CEILINGS)
        assert found.datasheet == pytest.approx(0.5)
        assert found.measured is None, "no e4m3 product was measured"
        reached = self.CEILINGS._replace(e4m3_tflops=1500.0)
        assert work.stage("x", 1.0, 1.0, work.Work(1e12, e4m3=True), None, reached).measured == pytest.approx(2 / 3)

    def test_without_work_there_is_only_time(self) -> None:
        found = work.stage("x", 1.0, 2.0, None, self.LIMITS, self.CEILINGS)
        assert (found.ms, found.calls, found.tflops, found.gbps, found.datasheet) == (1.0, 2.0, None, None, None)
