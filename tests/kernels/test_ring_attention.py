"""Ring attention by every implementation against dense float64 attention over explicitly moved keys."""

from dataclasses import replace

import pytest
import torch
from liveavatar_kernels import KernelUnavailableError
from liveavatar_kernels.cache import FIXED, MOVED, RING
from liveavatar_kernels.ring_attention import kernel, reference, ring_attention, tiling
from liveavatar_kernels.ring_attention.cases import CASES, Case
from liveavatar_kernels.ring_attention.tiling import Split, Tiling
from liveavatar_kernels.tolerances import EMULATION_SQNR, LEAST_SQNR, TIMES_WORSE
from support import relative_error, sqnr

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DENSE = [case for case in CASES if not case.quantized]
QUANTIZED = [case for case in CASES if case.quantized]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def by_case(cases: list[Case]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def _dense(arguments) -> torch.Tensor:
    """float64 attention with the moved keys rotated by the shift, head by head."""
    q, window = arguments["q"].double(), arguments["window"]
    turn = torch.complex(*window.shift.double())
    group_heads = q.shape[1] // len(window.segments)
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        group, one = head // group_heads, slice(head, head + 1)
        keys, values = [], []
        for row, k, v in reference.gather(arguments["ring"], arguments["sink"], window, group, one):
            k = k.double()
            if row == MOVED:
                pairs = torch.view_as_complex(k.unflatten(-1, (-1, 2)).contiguous())
                pairs[..., : len(turn)] *= turn
                k = torch.view_as_real(pairs).flatten(-2)
            keys.append(k[:, 0])
            values.append(v[:, 0].double())
        logits = q[:, head] @ torch.cat(keys).T * q.shape[-1] ** -0.5
        out[:, head] = logits.softmax(-1) @ torch.cat(values)
    return out


@by_case(DENSE)
def test_reference_equals_dense_attention_over_moved_keys(case: Case) -> None:
    arguments = case.arguments(torch.float32)
    out = ring_attention(**arguments, implementation="reference")
    assert relative_error(out, _dense(arguments)) <= 1e-6


@by_dtype
@by_case(DENSE)
def test_kernel_is_as_exact_as_torch_at_that_precision(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    exact = _dense(arguments)
    out = ring_attention(**arguments, implementation="triton")
    plain = ring_attention(**arguments, implementation="sdpa")
    assert out.dtype == dtype
    assert relative_error(out, exact) <= TIMES_WORSE * relative_error(plain, exact)


@by_case(QUANTIZED)
def test_e4m3_reference_is_exact_over_what_is_stored(case: Case) -> None:
    arguments = case.arguments(torch.float32)
    out = ring_attention(**arguments, implementation="reference")
    assert relative_error(out, _dense(arguments)) <= 1e-6


@by_dtype
@by_case(QUANTIZED)
def test_e4m3_kernel_rounds_where_the_emulation_does(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    emulated = ring_attention(**arguments, implementation="emulation").float()
    out = ring_attention(**arguments, implementation="triton").float()
    assert sqnr(out, emulated) >= EMULATION_SQNR, "beyond values that lie on the edge between two e4m3 numbers"


@pytest.mark.parametrize("implementation", ["emulation", "triton"])
@by_case(QUANTIZED)
def test_e4m3_signal_to_noise(case: Case, implementation: str) -> None:
    """Against float64 over the keys and values as they are stored: q and the weights are rounded besides."""
    arguments = case.arguments(torch.float32)
    assert sqnr(ring_attention(**arguments, implementation=implementation), _dense(arguments)) >= LEAST_SQNR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("processors", [2, 5, 64])
@by_case([DENSE[1], DENSE[8], QUANTIZED[0]])
def test_split_tiles_give_the_same(case: Case, processors: int, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(tiling, "_LEAST_TILES", 1)
    arguments = case.arguments(dtype)
    whole = kernel.ring_attention(**arguments, processors=1)
    split = kernel.ring_attention(**arguments, processors=processors)
    exact = _dense(arguments)
    assert relative_error(split, exact) <= 1.1 * relative_error(whole, exact) + 1e-7
    assert split.equal(kernel.ring_attention(**arguments, processors=processors)), "not deterministic"


@by_case([DENSE[1], DENSE[6], QUANTIZED[0]])
def test_tiles_by_tma_give_the_same(case: Case) -> None:
    arguments = case.arguments(torch.float16)
    tiles = Tiling.of(0, case.head_dim, arguments["ring"].k.itemsize)
    by_pointer = kernel.ring_attention(**arguments, tiling=tiles)
    assert kernel.ring_attention(**arguments, tiling=replace(tiles, tma=True)).equal(by_pointer)


def test_split_covers_every_tile_once() -> None:
    assert Split.of(1080, 132, 122) == Split(whole=1056, rest=24, parts=5)
    assert Split.of(1056, 132, 122) == Split(1056, 0, 1), "nothing is left over"
    assert Split.of(1000, 132, 122) == Split(1000, 0, 1), "76 of 132 processors are busy: halves do not fit"
    assert Split.of(20, 132, 122) == Split(0, 20, 6)
    assert Split.of(20, 132, 20) == Split(0, 20, 2), "parts would become too small"
    assert Split.of(1080, 132, 122).programs == 1056 + 24 * 5


def test_reference_in_tiles_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = DENSE[1].arguments(torch.float32)
    whole = reference.ring_attention(**arguments)
    monkeypatch.setattr(reference, "_LOGIT_BYTES", 7 * 3 * 1048 * 4)
    assert relative_error(reference.ring_attention(**arguments), whole) <= 1e-6


def test_float64_stays() -> None:
    arguments = DENSE[1].arguments(torch.float64)
    assert relative_error(ring_attention(**arguments), _dense(arguments)) <= 1e-14


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"q": torch.zeros(4, 3, 48)}, "head_dim must be 32, 64 or 128, not 48"),
        ({"q": torch.zeros(4, 2, 64)}, r"ring.k: expected \[slots, tokens, 2, 64\]"),
        ({"q": torch.zeros(4, 3, 64).bfloat16()}, "ring: expected both caches in torch.bfloat16"),
    ],
    ids=["head_dim", "heads", "dtype"],
)
def test_arguments_that_do_not_fit(change, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ring_attention(**{**DENSE[1].arguments(torch.float32), **change})


def test_window_is_checked() -> None:
    arguments = DENSE[1].arguments(torch.float32)
    window = arguments["window"]
    for change, complaint in (
        ({"segments": window.segments.long()}, "window.segments: expected int32"),
        ({"segments": window.segments.repeat(2, 1, 1)}, "groups dividing 3 heads"),
        ({"slots": window.slots[:1]}, "window.slots: expected int32"),
    ):
        with pytest.raises(ValueError, match=complaint):
            ring_attention(**{**arguments, "window": window._replace(**change)})


def test_what_cannot_run_says_why() -> None:
    arguments = DENSE[1].arguments(torch.float32)
    with pytest.raises(KernelUnavailableError, match="'fa3' cannot run here: needs a CUDA device"):
        ring_attention(**arguments, implementation="fa3")
    with pytest.raises(KernelUnavailableError, match="only for e4m3 caches"):
        ring_attention(**arguments, implementation="emulation")
    with pytest.raises(ValueError, match="no implementation 'cutlass'; it has triton"):
        ring_attention(**arguments, implementation="cutlass")


def test_flops_count_what_is_seen() -> None:
    case = Case("", 2, 64, 10, 100, 20, ({RING: (0, 50), FIXED: (0, 10), MOVED: (10, 5)},))
    assert case.flops == 4 * 10 * 65 * 2 * 64


def test_traces_without_running() -> None:
    arguments = DENSE[1].arguments(torch.float32)
    parts = (arguments["q"], *arguments["ring"], *arguments["sink"], *arguments["window"], "reference")
    torch.library.opcheck(
        torch.ops.liveavatar_kernels.ring_attention.default, parts, test_utils=("test_schema", "test_faketensor")
    )
