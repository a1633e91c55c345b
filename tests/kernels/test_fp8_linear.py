"""The FP8 linear layer by every implementation against float64 over the operands as they are stored."""

import json
from pathlib import Path

import pytest
import torch
from liveavatar_kernels import KernelUnavailableError
from liveavatar_kernels.e4m3 import E4M3, Quantized, quantize_rows, scale_of, to_e4m3
from liveavatar_kernels.fp8_linear import (
    OP,
    choices,
    cuda,
    fp8_linear,
    fp8_linear_quantized,
    kernel,
    library,
    reference,
)
from liveavatar_kernels.fp8_linear.cases import CASES, Case, model_cases
from liveavatar_kernels.fp8_linear.tiling import ROW_MAX_COLUMNS, Tiling, suits_tma, suits_wide_tiles
from liveavatar_kernels.model_sizes import WAN_14B
from liveavatar_kernels.tolerances import LEAST_SQNR, TIMES_WORSE
from support import relative_error
from torch.nn import functional as F

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DENSE = [case for case in CASES if not case.quantized]
QUANTIZED = [case for case in CASES if case.quantized]
AWKWARD = next(case for case in DENSE if case.name == "awkward lengths")
OUTLIERS = next(case for case in DENSE if case.outliers)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_implementation = pytest.mark.parametrize("implementation", ["reference", "triton"])


def by_case(cases: list[Case]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def _in_torch(arguments, dtype: torch.dtype) -> torch.Tensor:
    """The layer over the dequantised operands in torch at a precision."""
    x, weight = arguments["x"], arguments["weight"]
    wide = (x.values.double() * x.scale.double()[:, None]).to(dtype)
    weight = (weight.double() * arguments["weight_scale"].double()[:, None]).to(dtype)
    bias = None if arguments["bias"] is None else arguments["bias"].to(dtype)
    y = F.linear(wide, weight, bias)
    return F.gelu(y, approximate="tanh") if arguments["gelu"] else y


def _plain(arguments, **keywords):
    """`kernel.fp8_linear` with the op's arguments."""
    x, bias, gelu = arguments["x"], arguments["bias"], arguments["gelu"]
    dtype = arguments.get("dtype", torch.bfloat16)
    row_max = keywords.pop("row_max", False)
    return kernel.fp8_linear(*x, arguments["weight"], arguments["weight_scale"], bias, gelu, dtype, row_max, **keywords)


@by_implementation
@by_dtype
@by_case(DENSE)
def test_as_exact_as_torch_at_that_precision(case: Case, dtype: torch.dtype, implementation: str) -> None:
    arguments = case.arguments(dtype)
    exact = _in_torch(arguments, torch.float64)
    y = fp8_linear(**arguments, implementation=implementation)
    assert y.dtype == dtype
    assert relative_error(y, exact) <= TIMES_WORSE * relative_error(_in_torch(arguments, dtype), exact)


@by_dtype
@by_case(DENSE)
def test_plain_kernel_takes_what_the_persistent_one_takes(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    exact = _in_torch(arguments, torch.float64)
    y, _ = _plain(arguments, tiling=Tiling(False, 64, 128, 64, 4, 1, group=2))
    assert relative_error(y, exact) <= TIMES_WORSE * relative_error(_in_torch(arguments, dtype), exact)


def test_cases_reach_both_kernels() -> None:
    taken = {suits_tma(a["x"].values, a["weight"], a["dtype"]) for a in (c.arguments(torch.bfloat16) for c in DENSE)}
    assert taken == {True, False}


@pytest.mark.parametrize("processors", [2, 5, 64])
def test_persistent_programs_share_the_tiles(processors: int) -> None:
    case = Case("", 130, 80, 520)
    arguments = case.arguments(torch.float32)
    alone, maxima = _plain(arguments, row_max=True, processors=1)
    shared, shared_maxima = _plain(arguments, row_max=True, processors=processors)
    assert shared.equal(alone)
    assert shared_maxima.equal(maxima)


@pytest.mark.parametrize(
    "tiling",
    [Tiling(True, 64, 256, 64, 4, 1), Tiling(True, 64, 128, 64, 4, 1, precise=True), Tiling(False, 64, 128, 64, 4, 1)],
    ids=["wide", "precise", "plain"],
)
@by_case([AWKWARD, Case("more columns", 70, 64, 520, gelu=True), Case("fewer than a tile", 5, 32, 136, bias=False)])
def test_row_maxima_are_those_of_the_result(case: Case, tiling: Tiling) -> None:
    arguments = case.arguments(torch.bfloat16)
    y, maxima = _plain(arguments, tiling=tiling, row_max=True)
    assert relative_error(y, _in_torch(arguments, torch.float64)) <= 5e-3
    assert maxima.shape == (case.tokens, -(-case.out_features // ROW_MAX_COLUMNS))
    assert maxima.equal(reference.row_maxima(y))


@by_implementation
@by_case(QUANTIZED)
def test_quantised_result(case: Case, implementation: str) -> None:
    arguments = case.arguments(torch.bfloat16)
    dense = fp8_linear(**arguments, dtype=torch.bfloat16, implementation=implementation)
    values, scale = fp8_linear_quantized(**arguments, implementation=implementation)
    assert values.dtype == E4M3
    expected, expected_scale = quantize_rows(dense)
    assert relative_error(scale, expected_scale) <= 1e-6
    stored, expected = values.float() * scale[:, None], expected.float() * expected_scale[:, None]
    assert relative_error(stored, expected) <= 1e-3, "beyond values that lie on the edge between two e4m3 numbers"


def test_without_row_maxima_the_quantiser_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = QUANTIZED[0].arguments(torch.bfloat16)
    handed_over = fp8_linear_quantized(**arguments, implementation="reference")
    monkeypatch.setattr("liveavatar_kernels.fp8_linear._FINDS_ROW_MAX", ())
    found = fp8_linear_quantized(**arguments, implementation="reference")
    assert found.values.float().equal(handed_over.values.float())
    assert found.scale.equal(handed_over.scale)


def _worst_token(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Signal to noise in dB of the token that fares worst; every channel counts alike, however large."""
    size = exact.norm(dim=0)
    noise = ((y.double() - exact) / size).norm(dim=1) / (exact / size).norm(dim=1)
    return float(-20 * noise.max().log10())


@by_implementation
def test_signal_to_noise_with_outliers(implementation: str) -> None:
    """Scales by token and by channel carry values 100 times larger; one scale for all drowns what is small."""
    x, weight = OUTLIERS.operands()
    exact = x.double() @ weight.double().T
    arguments = OUTLIERS.arguments(torch.float32) | {"bias": None, "implementation": implementation}
    assert _worst_token(fp8_linear(**arguments), exact) >= LEAST_SQNR

    whole = [scale_of(matrix.abs().amax()) for matrix in (x, weight)]
    arguments["x"] = Quantized(to_e4m3(x, whole[0]), whole[0].expand(len(x)).contiguous())
    arguments["weight"], arguments["weight_scale"] = (
        to_e4m3(weight, whole[1]),
        whole[1].expand(len(weight)).contiguous(),
    )
    assert _worst_token(fp8_linear(**arguments), exact) < 25


@by_implementation
def test_rows_may_be_apart(implementation: str) -> None:
    arguments = AWKWARD.arguments(torch.float32)
    wide = torch.full((AWKWARD.tokens, AWKWARD.in_features + 48), float("nan")).to(E4M3)
    wide[:, 16:-32] = arguments["x"].values
    apart = {**arguments, "x": arguments["x"]._replace(values=wide[:, 16:-32])}
    whole = fp8_linear(**arguments, implementation=implementation)
    assert fp8_linear(**apart, implementation=implementation).equal(whole)
    shifted = wide.new_empty(AWKWARD.tokens * AWKWARD.in_features + 3)[3:].view(AWKWARD.tokens, -1)
    shifted.copy_(arguments["x"].values)
    assert shifted.data_ptr() % 16
    plain = fp8_linear(**{**arguments, "x": arguments["x"]._replace(values=shifted)}, implementation=implementation)
    assert relative_error(plain, whole) <= 1e-6


@by_implementation
def test_bias_in_float32_beside_a_result_in_bf16(implementation: str) -> None:
    arguments = AWKWARD.arguments(torch.float32) | {"dtype": torch.bfloat16}
    y = fp8_linear(**arguments, implementation=implementation)
    assert relative_error(y, _in_torch(arguments, torch.float64)) <= 2.5e-3


@by_implementation
def test_no_tokens(implementation: str) -> None:
    arguments = AWKWARD.arguments(torch.float32)
    none = Quantized(arguments["x"].values[:0], arguments["x"].scale[:0])
    assert fp8_linear(**{**arguments, "x": none}, implementation=implementation).shape == (0, AWKWARD.out_features)


def test_reference_in_parts_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = AWKWARD.arguments(torch.float32)
    whole = fp8_linear(**arguments, implementation="reference")
    monkeypatch.setattr(reference, "_WEIGHT_BYTES", 4 * AWKWARD.in_features * 7)
    assert relative_error(fp8_linear(**arguments, implementation="reference"), whole) <= 1e-6


def test_tiles_fill_waves() -> None:
    assert not suits_wide_tiles(3375, 5120, 132), "540 tiles are 4.09 waves"
    assert suits_wide_tiles(3168, 5120, 132), "500 tiles are 3.8 waves"
    assert suits_wide_tiles(3375, 15360, 132)
    for case in model_cases(WAN_14B):
        tiling = Tiling.of(90, 132, case.tokens, case.in_features, case.out_features)
        assert tiling.precise == (case.in_features == WAN_14B.ffn_dim)
        assert tiling.columns == 128 or not tiling.precise, "both accumulators would not fit"
    assert Tiling.of(90, 132, 3375, 5120, 15360, itemsize=4).columns == 128, "a float32 tile would not fit"


def test_ahead_of_time_specs_cover_the_model() -> None:
    assert kernel.aot_specs(WAN_14B, 80) == []
    assert {spec.function for spec in kernel.aot_specs(WAN_14B, 89)} == {kernel.linear_plain}
    names = {spec.name for spec in kernel.aot_specs(WAN_14B, 90)}
    assert {"fp8_linear persistent 128x128 precise", "fp8_linear persistent 128x256 gelu row max"} <= names


def test_flops_and_bytes() -> None:
    case = Case("", 10, 32, 16, quantized=True)
    assert case.flops == 2 * 10 * 32 * 16
    assert case.bytes == (10 + 16) * 32 + 10 * 16 + 4 * (2 * 10 + 16) + 2 * 16


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weight": torch.zeros(200, 272)}, "weight: expected a matrix in torch.float8_e4m3fn"),
        ({"weight": torch.zeros(200, 64).to(E4M3)}, r"weight: expected \[out, 272\] for x of 272 features"),
        ({"weight": torch.zeros(272, 200).to(E4M3).t()}, "weight: the features of a row must lie together"),
        ({"weight_scale": torch.ones(3)}, r"weight_scale: expected torch.float32 \[200\]"),
        ({"weight_scale": torch.ones(400)[::2]}, "weight_scale: its numbers must lie together"),
        (
            {"x": Quantized(torch.zeros(4, 272).to(E4M3), torch.ones(4).double())},
            r"x.scale: expected torch.float32 \[4\]",
        ),
        ({"x": Quantized(torch.zeros(4, 272), torch.ones(4))}, "x.values: expected a matrix"),
        ({"bias": torch.zeros(200, dtype=torch.int32)}, "bias: expected torch.float32 or torch.float16"),
        ({"dtype": torch.float64}, "dtype: expected torch.float32 or"),
    ],
    ids=[
        "weight type",
        "features",
        "weight strides",
        "scales",
        "scale strides",
        "token scales",
        "x type",
        "bias",
        "dtype",
    ],
)
def test_arguments_that_do_not_fit(change, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        fp8_linear(**{**AWKWARD.arguments(torch.float32), **change})


def test_what_cannot_run_says_why() -> None:
    arguments = AWKWARD.arguments(torch.bfloat16)
    for name in ("cublaslt", "cuda"):
        with pytest.raises(KernelUnavailableError, match=f"'{name}' cannot run here: needs a CUDA device"):
            fp8_linear(**arguments, implementation=name)
    with pytest.raises(ValueError, match="no implementation 'te'; it has triton"):
        fp8_linear(**arguments, implementation="te")
    assert OP.choose(torch.device("cpu"), None) == "reference"


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((8, 0), "2.13.0", "needs sm_89 or newer"),
        ((8, 9), "2.11.0+cu130", "ignores the current stream"),
        ((8, 9), "2.12.0", None),
        ((9, 0), "2.11.0+cu130", None),
        ((10, 0), "2.13.0", None),
        ((12, 0), "2.13.0", "no rowwise scales on sm_120"),
    ],
)
def test_where_torch_has_rowwise_products(capability, version: str, reason: str | None, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", version)
    absent = library.scaled_mm_absent(torch.device("cuda"))
    assert (absent is None) if reason is None else (reason in absent)


def test_what_the_libraries_refuse() -> None:
    assert library.scaled_mm_refuses(3375, 13824, 5120, True) is None
    assert "pytorch/ao#4582" in library.scaled_mm_refuses(127, 9216, 3072, True)
    assert "multiples of 16" in library.scaled_mm_refuses(3375, 5120, 24, True)
    x, weight = torch.zeros(4, 32).to(E4M3), torch.zeros(16, 32).to(E4M3)
    assert cuda.refuses(x, weight, torch.bfloat16, True) is None
    assert cuda.refuses(x[:0], weight, torch.bfloat16, True) == "needs a token"
    assert "writes bfloat16" in cuda.refuses(x, weight, torch.float16, True)
    assert "dense" in cuda.refuses(torch.zeros(4, 48).to(E4M3)[:, :32], weight, torch.bfloat16, True)


def test_library_rounds_once_more_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call to torch, with the product itself replaced by the reference's."""
    arguments = AWKWARD.arguments(torch.bfloat16)

    def product(a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        assert a.shape[1] == b.shape[0]
        assert scale_a.shape == (len(a), 1)
        assert scale_b.shape == (1, b.shape[1])
        assert use_fast_accum
        y = (a.float() @ b.float()) * scale_a * scale_b
        return (y if bias is None else y + bias.float()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    for dtype in DTYPES:
        operands = (
            *arguments["x"],
            arguments["weight"],
            arguments["weight_scale"],
            arguments["bias"],
            True,
            dtype,
            True,
        )
        y, maxima = library.scaled_mm(*operands)
        exact = _in_torch(arguments, torch.float64)
        assert y.dtype == dtype
        assert maxima.shape == (AWKWARD.tokens, 0)
        assert relative_error(y, exact) <= TIMES_WORSE * relative_error(_in_torch(arguments, dtype), exact)


ROW = {
    "device": "NVIDIA H200",
    "in": 5120,
    "out": 15360,
    "gelu": False,
    "quantized": False,
    "implementation": "cuda",
    "measured": {"commit": "0" * 40, "command": "bench kernels", "us": {"cuda": 1.0, "triton": 2.0}},
}


def test_measured_choice_is_preferred(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("triton", "cuda")
    table = tmp_path / "choices.json"
    table.write_text(json.dumps([ROW]))
    monkeypatch.setattr(choices, "_PATH", table)
    choices._shipped.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    try:
        gpu = torch.device("cuda")
        assert choices.preferred(gpu, names, 5120, 15360, False, False) == ("cuda",)
        assert choices.preferred(gpu, names, 5120, 15360, False, True) == ()
        assert choices.preferred(torch.device("cpu"), names, 5120, 15360, False, False) == ()
        traced = torch.compile(
            lambda x: x + len(choices.preferred(gpu, names, 5120, 15360, False, False)), fullgraph=True, backend="eager"
        )
        assert traced(torch.zeros(())) == 1
    finally:
        choices._shipped.cache_clear()


def test_shipped_choices_are_sound() -> None:
    choices.parse(
        choices._PATH.read_text(encoding="utf-8"), [implementation.name for implementation in OP.implementations]
    )


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([ROW | {"implementation": "fast"}], r"row 1 \(NVIDIA H200, 5120 -> 15360\): no implementation 'fast'"),
        ([ROW, ROW], r"row 2 \(NVIDIA H200, .*an earlier row"),
        ([{"device": "NVIDIA H200"}], "row 1: expected the fields device, in, out"),
        ([ROW | {"in": "5120"}], "row 1: in must be of type int, not '5120'"),
        ([ROW | {"measured": {"us": {}}}], "measured: expected the fields commit, command, us"),
        (
            [ROW | {"implementation": "triton", "measured": ROW["measured"] | {"us": {"cuda": 1.0}}}],
            "no time of 'triton'",
        ),
    ],
    ids=["implementation", "twice", "fields", "types", "measured", "time"],
)
def test_broken_choices_name_the_row(rows, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        choices.parse(json.dumps(rows), ("triton", "cuda"))


def test_compiles_into_a_graph_as_one_node() -> None:
    arguments = AWKWARD.arguments(torch.bfloat16)

    def layer(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = Quantized(values, scale)
        return fp8_linear(**{**arguments, "x": x}), fp8_linear(**{**arguments, "x": x, "dtype": torch.float32})

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for ours, expected in zip(compiled(*arguments["x"]), layer(*arguments["x"]), strict=True):
        assert ours.equal(expected)


@pytest.mark.parametrize("row_max", [False, True])
def test_traces_without_running(row_max: bool) -> None:
    arguments = AWKWARD.arguments(torch.bfloat16)
    (x, x_scale), weight, weight_scale = arguments["x"], arguments["weight"], arguments["weight_scale"]
    rest = (weight_scale, arguments["bias"], True, torch.bfloat16, row_max, "reference")
    op = torch.ops.liveavatar_kernels.fp8_linear.default
    torch.library.opcheck(op, (x, x_scale, weight, *rest), test_utils="test_faketensor")
    # It compares its operands before and after, which torch cannot do for e4m3.
    torch.library.opcheck(op, (x.float(), x_scale, weight.float(), *rest), test_utils="test_schema")
