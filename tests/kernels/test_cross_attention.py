"""Cross attention by every implementation against dense float64 attention over the text with all its padding."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from liveavatar_kernels import KernelUnavailableError
from liveavatar_kernels.cross_attention import cross_attention, kernel, reference
from liveavatar_kernels.cross_attention.cases import CASES, EPS, Case, model_cases
from liveavatar_kernels.model_sizes import WAN_14B
from liveavatar_kernels.tolerances import TIMES_WORSE
from support import relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BY_NAME = {case.name: case for case in CASES}
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_implementation = pytest.mark.parametrize("implementation", ["reference", "triton", "sdpa"])


def _dense(arguments: dict[str, Any]) -> torch.Tensor:
    """float64 attention to n tokens and p copies of the next row, group by group and head by head."""
    q = arguments["q"].double()
    square = q.square().sum((2, 3), keepdim=True) / q[0, 0].numel()
    q = q / (square + EPS).sqrt() * arguments["norm_weight"].double().view(q.shape[2:])
    out = torch.empty_like(q)
    for group, (slot, seen, count) in enumerate(arguments["view"].tolist()):
        rows = [*range(seen), *([seen] * count)]
        k, v = (arguments[name][slot, rows].double() for name in "kv")
        for head in range(q.shape[2]):
            logits = q[group, :, head] @ k[:, head].T * q.shape[-1] ** -0.5
            out[group, :, head] = logits.softmax(-1) @ v[:, head]
    return out


@by_case
def test_reference_equals_attention_to_all_padding(case: Case) -> None:
    arguments = case.arguments(torch.float32)
    assert relative_error(cross_attention(**arguments, implementation="reference"), _dense(arguments)) <= 1e-6


@by_case
def test_float64_stays_and_the_collapse_is_exact(case: Case) -> None:
    arguments = case.arguments(torch.float64)
    out = cross_attention(**arguments)
    assert out.dtype == torch.float64
    assert relative_error(out, _dense(arguments)) <= 1e-14


@by_dtype
@by_case
def test_kernel_is_as_exact_as_torch_at_that_precision(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    exact = _dense(arguments)
    out = cross_attention(**arguments, implementation="triton")
    plain = cross_attention(**arguments, implementation="sdpa")
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert relative_error(out, exact) <= TIMES_WORSE * relative_error(plain, exact)
    assert out.equal(cross_attention(**arguments, implementation="triton")), "not deterministic"


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@by_dtype
def test_padding_counts_as_often_as_it_says(dtype: torch.dtype, implementation: str) -> None:
    """The same text, its padding as one key and token by token."""
    together = BY_NAME["short prompt"].arguments(dtype)
    apart = dict(together)
    rows = torch.arange(7 + 505).clamp(max=7)
    apart |= {name: together[name][:, rows] for name in "kv"}
    apart["view"] = torch.tensor([[1, 7 + 505, 0]], dtype=torch.int32)
    one, many = (cross_attention(**each, implementation=implementation) for each in (together, apart))
    plain = cross_attention(**together, implementation="sdpa")
    exact = _dense(together)
    allowed = TIMES_WORSE * relative_error(plain, exact)
    assert relative_error(one, exact) <= allowed
    assert relative_error(many, exact) <= allowed


@by_implementation
@pytest.mark.parametrize("count", [0, 1, 2])
def test_padding_by_its_count(count: int, implementation: str) -> None:
    arguments = BY_NAME["short prompt"].arguments(torch.float32)
    arguments["view"][0, 2] = count
    if not count:
        arguments["k"][1, 7] = arguments["v"][1, 7] = float("nan")
    assert relative_error(cross_attention(**arguments, implementation=implementation), _dense(arguments)) <= 1e-6


@by_implementation
def test_a_group_is_alone(implementation: str) -> None:
    """What other groups see of the same slots changes nothing, nor does NaN where only they look."""
    together = BY_NAME["few rows"].arguments(torch.float32)
    out = cross_attention(**together, implementation=implementation)
    for group, (slot, seen, count) in enumerate(together["view"].tolist()):
        alone = {**together, **{name: together[name].clone() for name in "kv"}}
        for name in "kv":
            alone[name][1 - slot] = float("nan")
            alone[name][slot, seen + (count > 0) :] = float("nan")
        alone |= {name: together[name][group : group + 1] for name in ("q", "view")}
        assert relative_error(cross_attention(**alone, implementation=implementation)[0], out[group]) <= 1e-6


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_group_that_sees_nothing_gets_no_plausible_result(implementation: str) -> None:
    arguments = BY_NAME["groups"].arguments(torch.float32)
    arguments["view"][1, 1:] = 0
    out = cross_attention(**arguments, implementation=implementation)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@by_implementation
@pytest.mark.parametrize("name", ["whole tiles, padded", "audio of one token"])
def test_tokens_and_rows_may_be_apart(name: str, implementation: str) -> None:
    apart, together = (replace(BY_NAME[name], apart=apart).arguments(torch.float32) for apart in (True, False))
    assert not apart["k"].is_contiguous()
    out = cross_attention(**apart, implementation=implementation)
    assert out.is_contiguous()
    assert out.equal(cross_attention(**together, implementation=implementation))


def test_tiles_of_a_gpu_give_the_same() -> None:
    """As on sm_90: those of a text, of few rows, and of float32."""
    for name, itemsize in (("every row", 2), ("few rows", 2), ("groups", 4)):
        case = BY_NAME[name]
        arguments = case.arguments(torch.float32)
        tiling = kernel._tiling(90, itemsize, case.rows)
        out = kernel.cross_attention(**arguments, tiling=tiling)
        assert relative_error(out, _dense(arguments)) <= 1e-6


def test_large_logits_stay_finite() -> None:
    """A query and keys that are far larger than usual, the padding's key the largest or the smallest of all."""
    arguments = BY_NAME["short prompt"].arguments(torch.float32)
    for factor in (-100.0, 100.0):
        loud = {**arguments, "k": arguments["k"] * 30}
        loud["k"][1, 7] *= factor
        for implementation in ("reference", "triton"):
            out = cross_attention(**loud, implementation=implementation)
            assert relative_error(out, _dense(loud)) <= 1e-4


def test_reference_in_tiles_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = BY_NAME["groups"].arguments(torch.float32)
    whole = reference.cross_attention(**arguments)
    monkeypatch.setattr(reference, "_LOGIT_BYTES", 5 * 3 * 3 * 100 * 4)
    assert relative_error(reference.cross_attention(**arguments), whole) <= 1e-6


def test_reference_never_reads_the_view_on_the_host() -> None:
    """Meta tensors have no values: whatever depended on them would raise."""
    arguments = BY_NAME["groups"].arguments(torch.float32, device="meta")
    out = reference.cross_attention(**arguments)
    assert out.is_meta
    assert out.shape == arguments["q"].shape


@by_implementation
def test_nothing_is_changed(implementation: str) -> None:
    arguments = BY_NAME["groups"].arguments(torch.float32)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    cross_attention(**arguments, implementation=implementation)
    for name, value in before.items():
        assert arguments[name].nan_to_num(7.0).equal(value.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"q": torch.zeros(37, 3, 64)}, r"q: expected floating-point \[groups, tokens, heads, head_dim\]"),
        ({"q": torch.zeros(3, 37, 3, 64, dtype=torch.int32)}, "q: expected floating-point"),
        ({"q": torch.zeros(3, 3, 37, 64).transpose(1, 2)}, "q: the heads of a token must lie together"),
        ({"norm_weight": torch.ones(64)}, r"norm_weight: expected contiguous \[192\], not \[64\]"),
        ({"norm_weight": torch.ones(384)[::2]}, r"norm_weight: expected contiguous \[192\]"),
        ({"k": torch.zeros(3, 100, 2, 64)}, r"k: expected torch.float32 \[slots, rows, 3, 64\]"),
        ({"k": torch.zeros(100, 3, 64)}, r"k: expected torch.float32 \[slots, rows, 3, 64\], not torch.float32 \[100"),
        ({"k": torch.zeros(3, 100, 3, 64).bfloat16()}, "k: expected torch.float32"),
        ({"v": torch.zeros(3, 99, 3, 64)}, r"v: expected torch.float32 \[3, 100, 3, 64\] like k"),
        ({"v": torch.zeros(3, 100, 3, 64).half()}, "v: expected torch.float32"),
        ({"v": torch.zeros(3, 100, 64, 3).mT}, "v: the heads of a token must lie together"),
        ({"view": torch.zeros(3, 3).long()}, r"view: expected contiguous int32 \[3, 3\], not torch.int64"),
        ({"view": torch.zeros(2, 3, dtype=torch.int32)}, r"view: expected contiguous int32 \[3, 3\]"),
        ({"view": torch.zeros(3, 3, dtype=torch.int32).T}, r"view: expected contiguous int32 \[3, 3\]"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        cross_attention(**{**BY_NAME["groups"].arguments(torch.float32), **change})


def test_what_cannot_run_says_why() -> None:
    arguments = BY_NAME["groups"].arguments(torch.float64)
    with pytest.raises(KernelUnavailableError, match="no float64"):
        cross_attention(**arguments, implementation="triton")
    odd = Case("", 2, 48, 5, 4, ((0, 3, 9),)).arguments(torch.float32)
    with pytest.raises(KernelUnavailableError, match="head_dim must be 32, 64 or 128, not 48"):
        cross_attention(**odd, implementation="triton")
    assert relative_error(cross_attention(**odd), _dense(odd)) <= 1e-6, "the reference takes any"


def test_traces_without_running() -> None:
    arguments = BY_NAME["groups"].arguments(torch.float32)
    torch.library.opcheck(
        torch.ops.liveavatar_kernels.cross_attention.default,
        (*arguments.values(), "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_into_a_graph_as_one_node() -> None:
    arguments = BY_NAME["audio"].arguments(torch.float32)

    def attended(q: torch.Tensor) -> torch.Tensor:
        return cross_attention(**{**arguments, "q": q, "implementation": "reference"})

    compiled = torch.compile(attended, backend="eager", fullgraph=True)
    assert compiled(arguments["q"]).equal(attended(arguments["q"]))


def test_cases_of_the_model() -> None:
    cases = {case.name: case for case in model_cases(WAN_14B)}
    usual, diagonal = cases["3168 tokens, text of 100"], cases["4 x 3168 tokens, text of 100"]
    assert usual.views == ((0, 100, 412),)
    assert usual.flops == 4 * 3168 * 101 * 5120
    assert usual.bytes == 4 * 5120 * (3168 + 101)
    assert diagonal.bytes == 4 * 5120 * (4 * 3168 + 101), "one session's blocks read one text"
    audio = cases["4 x 3168 tokens, audio"]
    assert (len(audio.views), audio.group_tokens, audio.rows) == (12, 1056, 5)
    assert audio.tokens == diagonal.tokens == 4 * 3168
    assert audio.bytes == 4 * 5120 * (12 * 1056 + 12 * 5)


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_kernels_of_text_and_audio_are_compiled_ahead_of_time(capability: int) -> None:
    norms, text, audio = kernel.aot_specs(WAN_14B, capability)
    assert norms.constexprs == {"ROWS": 2, "WIDTH": 1024, "PARTS": 5}
    assert text.matrix
    assert audio.matrix
    assert audio.constexprs["KEYS"] == audio.constexprs["TAIL"] == 16
