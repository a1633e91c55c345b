"""wav2vec2 states, their 30 Hz features and the model's audio columns against the reference."""

import pytest
from support import CPU, GoldenCase, golden_cases, relative_error

from liveavatar_engine.conditions.audio_encoder import AudioEncoder, features_30hz, pick_columns, state_moments
from liveavatar_engine.conditions.audio_features import GlobalFeatures
from liveavatar_engine.weights.layout import Checkpoint


@pytest.fixture(scope="module")
def encoder(golden_checkpoint):
    return AudioEncoder.load(Checkpoint(golden_checkpoint).audio_encoder, CPU)


@pytest.mark.parametrize("case", golden_cases("audio"))
def test_states_features_and_columns(case: GoldenCase, encoder: AudioEncoder) -> None:
    states = encoder.states(case["waveform"].numpy())
    features = features_30hz(states)
    columns = pick_columns(features, 0, case["audio_input"].shape[-1])
    assert states.shape[1] == state_moments(len(case["waveform"]))
    assert relative_error(states, case["hidden_states"]) <= 1e-5
    assert relative_error(features, case["features_30hz"]) <= 1e-5
    assert relative_error(columns[None], case["audio_input"]) <= 1e-5


@pytest.mark.parametrize("case", golden_cases("audio"))
def test_blocks_are_slices_of_the_columns(case: GoldenCase, encoder: AudioEncoder) -> None:
    features = GlobalFeatures(encoder, case["waveform"].numpy(), columns_per_block=12)
    blocks = []
    while (block := features.block(len(blocks))) is not None:
        blocks.append(block)
    duration = len(case["waveform"]) / case.parameters["sample_rate"]
    assert len(blocks) == -(-duration * case.parameters["fps"] // 12)
    for index, block in enumerate(blocks):
        expected = case["audio_input"][..., index * 12 : (index + 1) * 12]
        assert relative_error(block[..., : expected.shape[-1]], expected) <= 1e-5
