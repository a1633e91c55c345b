"""Stand-ins of `compare` against what they stand in for."""

from __future__ import annotations

import importlib
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from liveavatar_engine.bench.compare import patches, stand_ins
from liveavatar_engine.bench.compare.stand_ins import StandInLog, rearrange
from liveavatar_engine.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("pattern", "sizes", "expected"),
    [
        ("b (t n) c -> (b t) n c", {"t": 3}, lambda x: x.reshape(6, 5, 7)),
        ("b t c -> b c t", {}, lambda x: x.transpose(1, 2)),
        ("b (n t) c -> b t (n c)", {"n": 3}, lambda x: x.view(2, 3, 5, 7).transpose(1, 2).reshape(2, 5, 21)),
        ("(b k) t c -> b t k c", {"b": 2}, lambda x: x[:, :, None]),
    ],
)
def test_rearrange(pattern, sizes, expected) -> None:
    x = torch.randn(2, 15, 7)
    assert rearrange(x, pattern, **sizes).equal(expected(x))


def test_packages_that_are_absent_come_and_go() -> None:
    log = StandInLog()
    before = dict(sys.modules)
    with stand_ins.packages(torch.device("cuda"), log):
        diffusers = importlib.import_module("diffusers.models.attention")
        unused = importlib.import_module("diffusers.utils").is_torch_version
        assert importlib.import_module("flash_attn").flash_attn_varlen_func
        assert diffusers.AdaLayerNorm
        with pytest.raises(InputError, match=r"calls diffusers\.utils\.is_torch_version, .* no stand-in"):
            unused(">=", "2.0")
    assert {one.name for one in log.used} == {
        "diffusers.models.attention.AdaLayerNorm",
        "flash_attn.flash_attn_varlen_func",
    }
    assert dict(sys.modules) == before


def test_packages_that_are_installed_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "einops.py").write_text("def rearrange(x, pattern): return 'the real one'")
    monkeypatch.syspath_prepend(tmp_path)
    with stand_ins.packages(CPU, StandInLog()):
        assert importlib.import_module("einops").rearrange(None, "") == "the real one"
    monkeypatch.delitem(sys.modules, "einops")


def test_recorded_arguments_are_attributes() -> None:
    with stand_ins.packages(CPU, StandInLog()):
        configuration = importlib.import_module("diffusers.configuration_utils")
        base = importlib.import_module("diffusers.models.modeling_utils").ModelMixin

    class Model(base):
        @configuration.register_to_config
        def __init__(self, width=3, depth=4):
            super().__init__()
            self.layer = nn.Linear(width, depth, dtype=torch.bfloat16)

    model = Model(depth=5)
    assert (model.width, model.depth, model.layer.out_features) == (3, 5, 5)
    assert (model.dtype, model.device) == (torch.bfloat16, CPU)
    with pytest.raises(AttributeError, match="height"):
        _ = model.height


def test_adaptive_norm() -> None:
    with stand_ins.packages(CPU, StandInLog()):
        kind = importlib.import_module("diffusers.models.attention").AdaLayerNorm
    layer = kind(embedding_dim=6, output_dim=16, chunk_dim=1)
    x, embedding = torch.randn(2, 5, 8), torch.randn(2, 6)
    shift, scale = (F.silu(embedding) @ layer.linear.weight.T + layer.linear.bias)[:, None].chunk(2, dim=-1)
    expected = F.layer_norm(x, (8,), eps=1e-5) * (1 + scale) + shift
    torch.testing.assert_close(layer(x, temb=embedding), expected)
    with pytest.raises(InputError, match="AdaLayerNorm"):
        kind(embedding_dim=6, num_embeddings=3)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of [tokens, heads, head_dim], spelled out."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v)


def test_flash_attention_by_key_lengths() -> None:
    q, k, v = torch.randn(3, 7, 2, 8), torch.randn(3, 9, 2, 8), torch.randn(3, 9, 2, 8)
    found = patches._flash_attention(q, k, v, k_lens=torch.tensor([9, 4, 1]))
    for row, length in enumerate((9, 4, 1)):
        torch.testing.assert_close(found[row], attended(q[row], k[row, :length], v[row, :length]))
    torch.testing.assert_close(patches._flash_attention(q, k, v)[1], attended(q[1], k[1], v[1]))
    half = patches._flash_attention(q, k, v.bfloat16())
    assert half.dtype == torch.float32
    assert 0 < float((half[1] - attended(q[1], k[1], v[1])).norm()) < 0.1


def test_flash_attention_of_sequences_one_behind_the_other() -> None:
    with stand_ins.packages(torch.device("cuda"), StandInLog()):
        flash = importlib.import_module("flash_attn").flash_attn_varlen_func
    q, k, v = torch.randn(6, 2, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    q_starts, k_starts = torch.tensor([0, 3, 6]), torch.tensor([0, 5, 10])
    found = flash(q, k, v, q_starts, k_starts, 3, 5, deterministic=False)
    torch.testing.assert_close(found[:3], attended(q[:3], k[:5], v[:5]))
    torch.testing.assert_close(found[3:], attended(q[3:], k[5:], v[5:]))
    with pytest.raises(InputError, match="several lengths"):
        flash(q, k, v, q_starts, torch.tensor([0, 4, 10]), 3, 6)
    with pytest.raises(InputError, match="causal True"):
        flash(q, k, v, q_starts, k_starts, 3, 5, causal=True)


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (4, 4)}, {"dropout_p": 0.1}])
def test_attention_that_the_reference_never_asks_for_is_refused(options: dict[str, object]) -> None:
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(InputError, match="no stand-in: install flash_attn"):
        patches._flash_attention(x, x, x, **options)  # type: ignore[arg-type]


def test_float32_regions_of_a_half_precision_model() -> None:
    layer, x = nn.Linear(32, 16).bfloat16(), torch.randn(5, 32)
    with patches.autocast(CPU, torch.bfloat16, StandInLog()), torch.amp.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with torch.cuda.amp.autocast(dtype=torch.float32):
            wide = layer(x)
            assert F.layer_norm(x.bfloat16(), (32,)).dtype == torch.float32
            with torch.cuda.amp.autocast(enabled=False):
                assert torch.cuda.amp.autocast is not None
        with torch.amp.autocast("cuda", enabled=False):
            assert (x @ x.T).dtype == torch.float32
        assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(wide, F.linear(x, layer.weight.float(), layer.bias.float()))


def test_autocast_as_a_decorator() -> None:
    with patches.autocast(CPU, torch.bfloat16, StandInLog()):
        wide = torch.cuda.amp.autocast(dtype=torch.float32)(lambda layer, x: layer(x))
        layer = nn.Linear(4, 4).bfloat16()
        assert wide(layer, torch.randn(2, 4)).dtype == wide(layer, torch.randn(2, 4)).dtype == torch.float32


def test_cuda_literals() -> None:
    log = StandInLog()
    with patches.cuda_literals(CPU, log):
        assert torch.zeros(2).to("cuda").device == torch.empty(2, device="cuda:0").device == CPU
        assert torch.zeros(2).cuda().device == CPU
        assert torch.zeros(2).to(torch.float16).dtype == torch.float16
    assert [one.name for one in log.used] == ['the literal "cuda"']


def test_the_width_of_zero_tokens() -> None:
    log = StandInLog()
    with patches.width_literal(64, log):
        assert torch.zeros([1, 5120, 0, 4, 6]).shape == (1, 64, 0, 4, 6)
        assert torch.zeros([1, 5120, 2]).shape == torch.zeros([1, 5120, 2]).shape == (1, 5120, 2)
    assert len(log.used) == 1


def test_the_fixed_sink_distance_leaves_other_draws_alone() -> None:
    with patches.sink_distance(12, StandInLog()):
        assert {random.randint(4, 30) for _ in range(20)} == {12}
        assert len({random.randint(0, 10**9) for _ in range(20)}) > 1
    assert len({random.randint(4, 30) for _ in range(50)}) > 1


def test_without_roundings() -> None:
    x = torch.rand(3)
    with patches.unrounded():
        assert x.to(torch.bfloat16) is x
        assert x.to(torch.float16).dtype == torch.float64
        assert x.to(torch.float64).dtype == torch.float64
    assert x.to(torch.bfloat16).dtype == torch.bfloat16


def test_parameters_without_storage() -> None:
    with patches.parameters_on_meta():
        layer = nn.Linear(4, 4)
        plain = torch.zeros(2)
    assert [layer.weight.is_meta, layer.bias.is_meta, plain.is_meta] == [True, True, False]
    assert not nn.Linear(4, 4).weight.is_meta


def test_packages_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their `__init__` files are not run, and modules of the same name that were there before come back."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "inner" / "one.py").write_text("from outermost.two import VALUE")
    (tmp_path / "two.py").write_text("VALUE = 2")
    earlier = sys.modules["outermost"] = type(sys)("outermost")
    try:
        folders = {"outermost": str(tmp_path), "outermost.inner": str(tmp_path / "inner")}
        with patches.own_packages("outermost", folders):
            assert importlib.import_module("outermost.inner.one").VALUE == 2
        assert not list(tmp_path.rglob("*.pyc"))
        assert [name for name in sys.modules if name.startswith("outermost")] == ["outermost"]
        assert sys.modules["outermost"] is earlier
    finally:
        del sys.modules["outermost"]


@pytest.mark.parametrize("compiled", [True, False])
def test_the_references_switch_for_compiling(compiled: bool) -> None:
    before = os.environ.get("ENABLE_COMPILE")
    with patches.compile_switch(compiled):
        assert os.environ["ENABLE_COMPILE"] == str(compiled).lower()
    assert os.environ.get("ENABLE_COMPILE") == before
