"""Ring write: norms, rotation, slots and wrapping, by every implementation."""

import pytest
import torch
from liveavatar_kernels.e4m3 import E4M3, KV_TILE, padded_to_tile, quantize_rows, scale_of, to_e4m3
from liveavatar_kernels.model_sizes import WAN_14B
from liveavatar_kernels.ring_write import kernel, reference, ring_write
from liveavatar_kernels.ring_write.cases import CASES, EPS, Case, in_torch
from liveavatar_kernels.tolerances import FLIPPED_SHARE, TIMES_WORSE
from support import bits, relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DENSE = [case for case in CASES if not case.quantized]
QUANTIZED = [case for case in CASES if case.quantized]
BY_NAME = {case.name: case for case in CASES}
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_implementation = pytest.mark.parametrize("implementation", ["reference", "triton"])


def _exact(arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated q and k in float64."""
    cos, sin = (table.double()[:, None] for table in arguments["angles"].table())

    def rotated(x, weight):
        flat = x.double().flatten(1)
        if weight is not None:
            flat = flat / (flat.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        normed = flat.view_as(x)
        turned = torch.view_as_complex(normed.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
        return torch.view_as_real(turned).flatten(-2)

    return rotated(arguments["q"], arguments["q_weight"]), rotated(arguments["k"], arguments["k_weight"])


@by_implementation
@by_dtype
@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_as_exact_as_torch_at_that_precision(case: Case, dtype: torch.dtype, implementation: str) -> None:
    arguments = case.arguments(dtype)
    q = ring_write(**arguments, implementation=implementation)
    cache, slots = arguments["cache"], case.slots()
    for ours, exact, plain in zip((q, cache.k[1, slots]), _exact(arguments), in_torch(arguments), strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, exact) <= TIMES_WORSE * relative_error(plain, exact)
    assert cache.v[1, slots].equal(arguments["v"])


def _by_tile(cache) -> list[torch.Tensor]:
    """The tensors of an e4m3 cache as [slots, tiles, ...]."""
    k, v, k_scale, v_scale = cache
    split = [x.unflatten(axis, (-1, KV_TILE)).movedim(axis, 1) for x, axis in ((k, 1), (v, 3), (k_scale, 2))]
    return [*split, v_scale.movedim(2, 1)]


@by_implementation
@by_case
def test_other_slots_stay_untouched(case: Case, implementation: str) -> None:
    arguments = case.arguments(torch.float32)
    before = [tensor.clone() for tensor in arguments["cache"][:4] if tensor is not None]
    ring_write(**arguments, implementation=implementation)
    touched = torch.zeros(case.cache_tokens, dtype=torch.bool)
    touched[case.slots()] = True
    after = [tensor for tensor in arguments["cache"][:4] if tensor is not None]
    if case.quantized:
        touched = touched.view(-1, KV_TILE).any(-1)
        before, after = _by_tile(before), _by_tile(after)
    for old, new in zip(before, after, strict=True):
        assert bits(new[0]).equal(bits(old[0])), "another session's slot"
        assert bits(new[1][~touched]).equal(bits(old[1][~touched]))
        assert not new[1][touched].float().isnan().any()


@by_implementation
@by_dtype
@pytest.mark.parametrize("case", QUANTIZED, ids=lambda case: case.name)
def test_e4m3_cache_holds_the_quantised_keys_and_values(case: Case, dtype: torch.dtype, implementation: str) -> None:
    arguments = case.arguments(dtype)
    ring_write(**arguments, implementation=implementation)
    cache, slots = arguments["cache"], case.slots()
    keys, scales = quantize_rows(_exact(arguments)[1].float())
    stored = cache.k[1, slots].float() * cache.k_scale[1][:, slots].T[..., None]
    assert relative_error(cache.k_scale[1][:, slots].T, scales) <= 1e-6
    exact = keys.float() * scales[..., None]
    differing = (stored - exact).abs() > 1e-6 * exact.abs()
    assert differing.float().mean() <= FLIPPED_SHARE, "beyond values that lie on the edge between two e4m3 numbers"
    assert relative_error(stored, exact) <= 1e-3

    first = case.start // KV_TILE * KV_TILE
    covered = padded_to_tile(case.start - first + case.tokens)
    values = torch.zeros(covered, case.heads, case.head_dim)
    values[slots - first] = arguments["v"].float()
    tiles = values.unflatten(0, (-1, KV_TILE))
    value_scales = scale_of(tiles.abs().amax(dim=(1, 3)))
    expected = to_e4m3(tiles, value_scales[:, None, :, None]).flatten(0, 1)
    here = slice(first, first + covered)
    assert cache.v[1, :, :, here].float().equal(expected.permute(1, 2, 0).float())
    assert cache.v_scale[1, :, first // KV_TILE : (first + covered) // KV_TILE].equal(value_scales.T)
    unused = torch.ones(covered, dtype=torch.bool)
    unused[slots - first] = False
    assert not cache.k[1, here][unused].float().any()


@by_dtype
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("case", [BY_NAME["wrapping"], BY_NAME["e4m3, off a tile"]], ids=lambda case: case.name)
def test_tokens_of_a_program_change_nothing(case: Case, rows: int, dtype: torch.dtype) -> None:
    ours, usual = case.arguments(dtype), case.arguments(dtype)
    q = kernel.ring_write(**ours, rows=rows)
    assert q.equal(ring_write(**usual, implementation="triton"))
    for written, expected in zip(ours["cache"][:4], usual["cache"][:4], strict=True):
        assert (written is None) == (expected is None)
        assert written is None or bits(written).equal(bits(expected))


def test_a_program_takes_one_token_at_the_models_sizes() -> None:
    tokens = [spec for spec in kernel.aot_specs(WAN_14B, 90) if spec.function is kernel.write_tokens]
    assert {spec.constexprs["ROWS"] for spec in tokens} == {1}


def test_reference_is_float64_for_float64() -> None:
    arguments = DENSE[1].arguments(torch.float64)
    q = reference.ring_write(**arguments)
    assert relative_error(q, _exact(arguments)[0]) <= 1e-14


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"k": torch.zeros(9, 2, 64)}, "k: expected"),
        ({"q_weight": torch.ones(5)}, r"q_weight: expected \[128\]"),
        ({"k_weight": None}, "q_weight and k_weight: expected both"),
        ({"at": torch.tensor([1, 0])}, "at: expected int32"),
        ({"q": torch.zeros(10, 64, 2).transpose(1, 2)}, "q: the heads of a token must lie together"),
    ],
    ids=["k", "weight", "weights", "at", "strides"],
)
def test_arguments_that_do_not_fit(change, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ring_write(**{**DENSE[1].arguments(torch.float32), **change})


def test_e4m3_caches_are_checked() -> None:
    arguments = QUANTIZED[0].arguments(torch.float32)
    with pytest.raises(ValueError, match="needs k_scale and v_scale"):
        ring_write(**{**arguments, "cache": arguments["cache"]._replace(k_scale=None)})
    assert arguments["cache"].k.dtype == E4M3


@by_implementation
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "e4m3"])
def test_shares_of_the_heads_normalised_before_are_the_whole(quantized: bool, implementation: str) -> None:
    """What several devices write that have some of the heads each, against one that has all."""
    case = Case("", heads=4, head_dim=32, frames=2, frame_tokens=9, cache_tokens=128, start=0, quantized=quantized)
    whole = case.arguments(torch.float32)
    expected = ring_write(**whole, implementation=implementation)
    normed = {
        name: torch.nn.functional.rms_norm(whole[name].flatten(1), (128,), whole[f"{name}_weight"], EPS).view_as(
            expected
        )
        for name in ("q", "k")
    }
    for first in (0, 2):
        heads = slice(first, first + 2)
        share = {name: tensor[:, heads] for name, tensor in (*normed.items(), ("v", whole["v"]))}
        half = Case("", heads=2, head_dim=32, frames=2, frame_tokens=9, cache_tokens=128, start=0, quantized=quantized)
        cache = half.arguments(torch.float32)["cache"]
        arguments = {**whole, **share, "cache": cache, "q_weight": None, "k_weight": None}
        q = ring_write(**arguments, implementation=implementation)
        assert relative_error(q, expected[:, heads]) <= 1e-6
        exact = {"v": 0, "k_scale": 0, "v_scale": 0} if quantized else {"k": 1, "v": 1}
        written = slice(None) if quantized else case.slots()
        for name, axis in exact.items():
            ours, theirs = (getattr(of, name)[1] for of in (cache, whole["cache"]))
            theirs = theirs.narrow(axis, first, 2)
            assert relative_error(ours[written].float(), theirs[written].float()) <= 1e-6, name


def test_traces_without_running() -> None:
    case = DENSE[1]
    arguments = case.arguments(torch.float32)
    torch.library.opcheck(
        torch.ops.liveavatar_kernels.ring_write.default,
        (
            *(arguments[name] for name in ("q", "k", "v", "q_weight", "k_weight")),
            *arguments["angles"],
            *arguments["cache"],
            arguments["at"],
            EPS,
            "reference",
        ),
        test_utils=("test_schema", "test_faketensor"),
    )
