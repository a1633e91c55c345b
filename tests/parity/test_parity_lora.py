"""Merged adapter weights against the reference, under both naming styles."""

import pytest
from support import CPU, GOLDEN, GoldenCase, golden_cases, relative_error
from torch import float32

from liveavatar_engine.weights.network import load_network


@pytest.mark.parametrize("adapter", ["lora.safetensors", "lora_plain_names.safetensors"])
@pytest.mark.parametrize("case", golden_cases("lora"))
def test_merged_weights(case: GoldenCase, adapter: str, golden_checkpoint, golden_network) -> None:
    merged = load_network(golden_checkpoint, GOLDEN / adapter, float32, CPU).state_dict()
    plain = golden_network.state_dict()
    for name, expected in case.tensors.items():
        assert relative_error(merged[name], expected) <= 1e-6, name
        assert relative_error(plain[name], expected) > 1e-4, f"{name}: the adapter changes nothing"
    for name in plain.keys() - case.tensors.keys():
        assert merged[name].equal(plain[name]), name


def test_a_scale_of_ones_own(golden_checkpoint, golden_network) -> None:
    name = "blocks.0.self_attn.q.weight"
    plain = golden_network.get_parameter(name)
    stated, doubled = (
        load_network(golden_checkpoint, GOLDEN / "lora.safetensors", float32, CPU, lora_scale=scale).get_parameter(name)
        for scale in (None, 1.0)
    )
    assert relative_error(doubled - plain, 2 * (stated - plain)) <= 1e-5
