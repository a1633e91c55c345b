"""Cross attention in the kernel bench: what it is compared with, and what of that is timed."""

import pytest
import torch
from liveavatar_kernels.cross_attention import cross_attention, library
from liveavatar_kernels.model_sizes import WAN_14B
from support import CPU

from liveavatar_engine.bench.kernels import suite
from liveavatar_engine.bench.kernels.subjects import CROSS_ATTENTION


def test_repeating_the_padding_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CROSS_ATTENTION.cases[0]
    arguments = CROSS_ATTENTION.arguments(case, torch.float32, CPU, 0)
    (one,) = (one for one in CROSS_ATTENTION.candidates(case, CPU) if one.library)
    prepared = one.prepare(arguments)
    assert [text.k.shape[1] for text in prepared["texts"]] == [512], "every token of the padding is there"
    judge = CROSS_ATTENTION.judge(case, arguments)
    expected = cross_attention(**arguments, implementation="sdpa")
    monkeypatch.setattr(library, "padded", None)  # whatever calls it now raises
    outputs = one.run(prepared)
    assert all(finding.passes for finding in judge("sdpa", outputs))
    assert outputs[0].equal(expected)


def test_a_quick_run_looks_at_text_and_audio() -> None:
    names = [case.name for _, case in suite.selected(("cross_attention",), "", quick=True)]
    tokens = max(WAN_14B.block_tokens)
    assert names == [f"{tokens} tokens, text of 100", f"{tokens} tokens, text of 512", f"{tokens} tokens, audio"]
