"""Velocities, latents and sink caches of whole streams against the reference."""

import pytest
import torch
from golden_stream import GoldenStream
from support import CPU, GoldenCase, golden_cases, relative_error

from liveavatar_engine.denoise.schedule import flow_match_schedule
from liveavatar_engine.weights.network import load_network

BF16_ERROR = 2 * 2**-8
"""Two units of bf16's precision; one is what the engine measures on a CPU."""


@pytest.fixture(scope="module", params=golden_cases("dit"))
def stream(request, golden_network) -> GoldenStream:
    return GoldenStream(request.param, golden_network)


def test_latents(stream: GoldenStream) -> None:
    for block, latents in enumerate(stream.latents):
        assert relative_error(latents, stream.case["latents"][block]) <= 1e-5, f"block {block}"


@pytest.mark.parametrize("case", golden_cases("dit"))
def test_latents_in_bf16(case: GoldenCase, golden_checkpoint) -> None:
    low = GoldenStream(case, load_network(golden_checkpoint, None, torch.bfloat16, CPU))
    for block, latents in enumerate(low.latents):
        assert relative_error(latents, case["latents"][block]) <= BF16_ERROR, f"block {block}"


def test_velocities(stream: GoldenStream) -> None:
    if "velocities" not in stream.case.tensors:
        pytest.skip("the case keeps no velocities")
    kept = stream.case["velocity_blocks"].tolist()
    assert kept
    for row, block in enumerate(kept):
        for step, expected in enumerate(stream.case["velocities"][row]):
            assert relative_error(stream.velocities[block, step], expected) <= 1e-5, f"block {block} step {step}"


def test_sink_keys_and_values(stream: GoldenStream) -> None:
    names = [name for name in stream.case.tensors if name.startswith(("sink_k_layer", "sink_v_layer"))]
    if not names:
        pytest.skip("the case keeps no sink")
    for name in names:
        keys, values = stream.sinks[0][int(name.rpartition("layer")[2])]
        ours = stream.unrotated(keys) if name.startswith("sink_k") else values
        assert relative_error(stream.reference_order(ours), stream.case[name]) <= 1e-5, name


def test_sink_after_its_update(stream: GoldenStream) -> None:
    update_after = stream.case.parameters.get("aas_after")
    before, after = stream.sinks[0], stream.sinks[stream.case.parameters["num_blocks"]]
    if update_after is None:
        assert all(a.equal(b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))
        return
    assert stream.sinks[update_after][0][1].equal(before[0][1]), "the sink changed too early"
    if "sink_v_after_aas" in stream.case.tensors:
        expected = stream.case["sink_v_after_aas"]
        errors = [relative_error(stream.reference_order(values), expected) for _, values in after]
        assert min(errors) <= 1e-5


@pytest.mark.parametrize("case", golden_cases("dit") + golden_cases("pipeline"))
def test_schedule(case: GoldenCase) -> None:
    ours = flow_match_schedule(case.parameters["steps"], case.parameters.get("shift", 3))
    assert list(ours.timesteps) == case["timesteps"].tolist()
    assert list(ours.sigmas) == case["sigmas"].tolist()


@pytest.mark.parametrize("case", golden_cases("dit"))
def test_the_diagonal_schedule_makes_the_same_latents(case: GoldenCase, golden_network) -> None:
    diagonal = GoldenStream(case, golden_network, diagonal=True)
    assert len(diagonal.latents) == case.parameters["num_blocks"]
    for block, latents in enumerate(diagonal.latents):
        assert relative_error(latents, case["latents"][block]) <= 1e-5, f"block {block}"
