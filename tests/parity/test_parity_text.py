"""Token ids and text context against the reference."""

import pytest
import torch
from support import CPU, GoldenCase, golden_cases, relative_error

from liveavatar_engine.conditions.text import TextEncoder
from liveavatar_engine.weights.layout import Checkpoint


@pytest.fixture(scope="module")
def encoder(golden_checkpoint):
    files = Checkpoint(golden_checkpoint)
    return TextEncoder.load(files.text_encoder, files.tokenizer, torch.float32, CPU)


@pytest.mark.parametrize("case", golden_cases("tokenizer"))
def test_token_ids_and_mask_are_equal(case: GoldenCase, encoder: TextEncoder) -> None:
    ids, mask = encoder.tokenize(case.parameters["prompts"], case.parameters["text_len"])
    assert torch.equal(ids, case["ids"])
    assert torch.equal(mask, case["mask"])


@pytest.mark.parametrize("case", golden_cases("text"))
def test_context(case: GoldenCase, encoder: TextEncoder) -> None:
    context = encoder.encode(case["ids"][0], case["mask"][0])
    assert relative_error(context, case["context"]) <= 1e-5
