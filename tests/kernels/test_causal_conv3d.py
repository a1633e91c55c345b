"""The VAE's convolutions, by every implementation."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from liveavatar_kernels import KernelUnavailableError, extension
from liveavatar_kernels.causal_conv3d import OP, causal_conv3d, causal_conv3d_pixels, cuda, kernel, library
from liveavatar_kernels.causal_conv3d.cases import CASES, Case, in_torch, model_cases
from liveavatar_kernels.dispatch import never_absent
from liveavatar_kernels.model_sizes import WAN_14B
from liveavatar_kernels.tolerances import TIMES_WORSE
from support import bits, relative_error
from torch import Tensor
from torch.nn import functional as F

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FRAMES = tuple(case for case in CASES if not case.pixels)
PIXELS = next(case for case in CASES if case.pixels)
IN_PLACE = next(case for case in FRAMES if case.residual and case.bias)
by_case = pytest.mark.parametrize("case", FRAMES, ids=lambda case: case.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_implementation = pytest.mark.parametrize("implementation", ["reference", "triton", "cudnn"])


def _torch_for_cudnn(
    x: Tensor,
    weight: Tensor,
    padding: tuple[int, ...],
    stride: list[int],
    dilation: list[int],
    groups: int,
    benchmark: bool,
    deterministic: bool,
    tf32: bool,
    *,
    out: Tensor,
) -> Tensor:
    """What cuDNN would compute, if nothing has to be copied for it to read and write channels last."""
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    assert all(tensor.is_contiguous(memory_format=last) for tensor in (x, weight, out))
    assert not tf32
    assert {*stride, *dilation, groups} == {1}
    return out.copy_((F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, padding=padding))


def _convolve(arguments: dict[str, Any], implementation: str, out: Tensor | None = None) -> Tensor:
    """By an implementation; cuDNN is played by torch."""
    if implementation != "cudnn":
        return causal_conv3d(**arguments, out=out, implementation=implementation)
    with mock.patch.object(torch.ops.aten.cudnn_convolution, "out", _torch_for_cudnn):
        return library.causal_conv3d(**arguments, out=out)


def _pixels(arguments: dict[str, Any], implementation: str) -> Tensor:
    """As `_convolve`."""
    if implementation != "cudnn":
        return causal_conv3d_pixels(**arguments, implementation=implementation)
    out = torch.empty(*_exact(arguments).shape, dtype=torch.uint8)
    with mock.patch.object(torch.ops.aten.cudnn_convolution, "out", _torch_for_cudnn):
        library.causal_conv3d_pixels(**arguments, out=out)
    return out


def _exact(arguments: dict[str, Any]) -> Tensor:
    """In float64, with everything spelled out: frames side by side, pixels repeated, zeros around the picture."""
    x, weight = arguments["x"].double(), arguments["weight"].double()
    if arguments.get("interleaved"):
        x = torch.stack(x.chunk(2, dim=-1), dim=1).flatten(0, 1)
    x = x.permute(0, 3, 1, 2)
    if arguments.get("upsample"):
        x = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    rows, columns = weight.shape[2:4]
    x = F.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2))
    y = F.conv3d(x.transpose(0, 1)[None], weight.permute(0, 4, 1, 2, 3))[0].permute(1, 2, 3, 0)
    for added in (arguments["bias"], arguments.get("residual")):
        y = y if added is None else y + added.double()
    return y


@by_implementation
@by_dtype
@by_case
def test_as_exact_as_torch_at_that_precision(case: Case, dtype: torch.dtype, implementation: str) -> None:
    arguments = case.arguments(dtype)
    y = _convolve(arguments, implementation)
    exact = _exact(arguments)
    assert y.dtype == dtype
    assert y.shape == case.y_shape
    assert y.is_contiguous()
    allowed = TIMES_WORSE * relative_error(in_torch(arguments), exact)
    if dtype == torch.float32:
        allowed = max(allowed, math.sqrt(arguments["weight"][0].numel()) * 2**-24)  # a sum, term by term
    assert relative_error(y, exact) <= allowed


@by_implementation
@by_dtype
def test_history_is_what_lies_before(dtype: torch.dtype, implementation: str) -> None:
    """Frame by frame through a buffer: each call reads its past at the head of the part that it is given."""
    case = Case("", 5, 4, 6, 8, 16)
    arguments = case.arguments(dtype)
    whole = _convolve(arguments, implementation)
    parts = [_convolve({**arguments, "x": arguments["x"][i : i + 3]}, implementation) for i in range(5)]
    if implementation == "triton":
        assert bits(torch.cat(parts)).equal(bits(whole))
    else:
        assert relative_error(torch.cat(parts), whole) <= 4 * torch.finfo(dtype).eps


@by_implementation
@by_case
def test_reads_nothing_else(case: Case, implementation: str) -> None:
    """NaN all around what is given changes nothing: zeros around the picture come from nowhere."""
    arguments = case.arguments(torch.float32)
    surrounded = {}
    for name, tensor in arguments.items():
        surrounded[name] = tensor
        if isinstance(tensor, Tensor):
            memory = torch.full((3, *tensor.shape), float("nan"))
            surrounded[name] = memory[1].copy_(tensor)
    y = _convolve(surrounded, implementation)
    assert bits(y).equal(bits(_convolve(arguments, implementation)))
    assert not y.isnan().any()


@by_implementation
def test_nan_reaches_its_neighbours_alone(implementation: str) -> None:
    arguments = Case("", 2, 5, 6, 8, 4).arguments(torch.float32)
    arguments["x"][0, 2, 5, 3] = float("nan")
    expected = torch.zeros(2, 5, 6, dtype=torch.bool)
    expected[0, 1:4, 4:6] = True
    assert _convolve(arguments, implementation).isnan().all(-1).equal(expected)


@by_implementation
@by_dtype
@pytest.mark.parametrize("place", ["tail", "residual"])
def test_result_lies_where_it_is_wanted(place: str, dtype: torch.dtype, implementation: str) -> None:
    """In the tail of a buffer, whose head is left alone, or over the residual."""
    arguments = IN_PLACE.arguments(dtype)
    expected = _convolve(arguments, implementation)
    buffer = torch.full((2 + len(expected), *expected.shape[1:]), 7.0, dtype=dtype)
    out = buffer[2:] if place == "tail" else arguments["residual"]
    assert _convolve(arguments, implementation, out) is out
    assert bits(out).equal(bits(expected))
    assert (buffer[:2] == 7).all()


def test_memory_that_is_read_is_not_written() -> None:
    memory = torch.randn(8, 4, 4, 4)
    weight = torch.zeros(4, 1, 3, 3, 4)
    before = memory.clone()
    for arguments in (
        {"x": memory[:4], "out": memory[:4]},
        {"x": memory[:4], "out": memory[3:7]},
        {"x": torch.zeros(4, 4, 4, 4), "residual": memory[:4], "out": memory[1:5]},
    ):
        with pytest.raises(ValueError, match="out: shares memory with x, or a part of it with residual"):
            causal_conv3d(weight=weight, **arguments)
    assert memory.equal(before)


@by_implementation
@by_dtype
def test_pixels_are_those_of_the_convolution(dtype: torch.dtype, implementation: str) -> None:
    """Rounded to the nearest; between two, to either where float32 cannot tell, or in cuDNN's result x's dtype."""
    arguments = PIXELS.arguments(dtype)
    pixels = _pixels(arguments, implementation)
    expected = (_exact(arguments).clamp(-1, 1) + 1) * 127.5
    rounded = in_torch(arguments) if implementation == "cudnn" else expected
    slack = TIMES_WORSE * (rounded - expected).abs().max() + 127.5 * 2**-21
    assert pixels.dtype == torch.uint8
    assert pixels.shape == PIXELS.y_shape
    assert (pixels - expected).abs().max() <= 0.5 + slack
    assert pixels.min() == 0
    assert pixels.max() == 255


@by_implementation
def test_pixels_are_clamped_and_rounded_to_even(implementation: str) -> None:
    values = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0, 1 / 3, 125 / 127.5, 0.2, -0.7, 0.999])
    x = values[:, None, None, None].expand(-1, 1, 1, 4).contiguous()
    weight = torch.zeros(3, 1, 1, 1, 4)
    weight[:, 0, 0, 0, 1] = 1
    pixels = _pixels({"x": x, "weight": weight, "bias": torch.zeros(3)}, implementation)
    expected = ((values.clamp(-1, 1) + 1) * 127.5).round()
    assert expected[2] == 128, "127.5, between 127 and 128"
    assert pixels.float().equal(expected[:, None, None, None].expand(-1, 1, 1, 3))


def test_pixels_go_where_they_are_wanted() -> None:
    arguments = PIXELS.arguments(torch.float32)
    frames = torch.full((4, *PIXELS.y_shape[1:]), 7, dtype=torch.uint8)
    assert causal_conv3d_pixels(**arguments, out=frames[1:3]).data_ptr() == frames[1:3].data_ptr()
    assert frames[1:3].equal(causal_conv3d_pixels(**arguments))
    assert (frames[0] == 7).all()
    assert (frames[3] == 7).all()


def test_float64_stays() -> None:
    arguments = IN_PLACE.arguments(torch.float64)
    assert relative_error(causal_conv3d(**arguments), _exact(arguments)) <= 1e-14
    with pytest.raises(KernelUnavailableError, match="no float64"):
        causal_conv3d(**arguments, implementation="triton")


def test_frames_that_32_bits_cannot_address() -> None:
    x = torch.empty(1, 1 << 14, 1 << 14, 8, device="meta")
    weight = torch.empty(3, 1, 1, 1, 8, device="meta")
    with (
        mock.patch.object(type(OP), "__getitem__", return_value=mock.Mock(absent=never_absent)),
        pytest.raises(KernelUnavailableError, match="frames of 2147483648 elements or more"),
    ):
        causal_conv3d(x, weight, implementation="triton")


def test_triton_is_not_picked_unasked() -> None:
    assert OP["triton"].automatic == OP["cuda"].automatic == ()
    assert OP["cudnn"].automatic == ("cuda",)
    for name in ("cudnn", "cuda"):
        with pytest.raises(KernelUnavailableError, match="needs a CUDA device"):
            causal_conv3d(**IN_PLACE.arguments(torch.float32), implementation=name)


def test_what_cutlass_refuses() -> None:
    x, weight = torch.zeros(3, 4, 4, 96, dtype=torch.bfloat16), torch.zeros(96, 3, 3, 3, 96, dtype=torch.bfloat16)
    assert cuda.refuses(x, weight, True) is None
    assert "no upsampling, no interleaved frames, no bytes" in cuda.refuses(x, weight, False)
    assert "computes in bfloat16" in cuda.refuses(x.half(), weight, True)
    assert "multiples of 8" in cuda.refuses(x, weight[:4], True)


@pytest.mark.parametrize(("channels", "tile"), [(96, "256x96"), (192, "128x192"), (384, "128x192"), (40, "256x96")])
def test_what_cutlass_is_given(channels: int, tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mock.Mock(CONV_256X96="256x96", CONV_128X192="128x192")
    monkeypatch.setattr(extension, "load", lambda: module)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock(return_value=mock.Mock(cuda_stream=7)))
    case = Case("", 2, 4, 5, 8, channels, residual=True)
    arguments = case.arguments(torch.bfloat16)
    out = cuda.causal_conv3d(**arguments, out=None)
    assert out.shape == case.y_shape
    addresses = [0 if arguments[name] is None else arguments[name].data_ptr() for name in ("x", "weight", "bias")]
    addresses += [arguments["residual"].data_ptr(), out.data_ptr()]
    module.causal_conv3d.assert_called_once_with(*addresses, 2, 4, 5, 8, channels, 3, 3, 3, tile, 7)


X, W = torch.zeros(4, 5, 6, 8), torch.zeros(16, 3, 3, 3, 8)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": X[0]}, r"x: expected floating-point \[frames, height, width, channels\], not .* \[5, 6, 8\]"),
        ({"x": X.int()}, "x: expected floating-point .*, not torch.int32"),
        ({"x": X.transpose(1, 2)}, "x: expected to be contiguous"),
        ({"x": X.half()}, "weight: expected torch.float16 like x, not torch.float32"),
        ({"x": X[:2]}, "x: expected at least 3 frames"),
        ({"x": X[:, :0]}, "no empty axis"),
        ({"x": X[..., :6].contiguous()}, "x: expected 8 channels, as weight has them, not 6"),
        ({"weight": W[..., 0]}, r"weight: expected floating-point \[out, kt, kh, kw, in\]"),
        ({"weight": W[:, :, ::2]}, "weight: expected to be contiguous"),
        ({"weight": W[:, :, :2].contiguous()}, "weight: expected kernels of 1 or 3 rows and columns, not 2x3"),
        ({"upsample": True}, "weight: expected kt = 1 for a convolution that upsamples or is interleaved, not 3"),
        ({"interleaved": True}, "weight: expected kt = 1"),
        ({"weight": W[:, :1].contiguous(), "interleaved": True}, "x: expected 16 channels"),
        ({"bias": torch.zeros(8)}, r"bias: expected contiguous \[16\], not \[8\]"),
        ({"residual": torch.zeros(4, 5, 6, 16)}, r"residual: expected torch.float32 \[2, 5, 6, 16\] on cpu"),
        ({"residual": torch.zeros(2, 5, 6, 16).half()}, "residual: expected torch.float32"),
        ({"out": torch.zeros(2, 5, 6, 32)[..., :16]}, "out: expected to be contiguous"),
        ({"out": torch.zeros(2, 5, 6, 8)}, r"out: expected torch.float32 \[2, 5, 6, 16\] on cpu"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        causal_conv3d(**{"x": X, "weight": W, **change})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weight": W, "bias": torch.zeros(16)}, "weight: expected 3 output channels for pixels, not 16"),
        ({"out": torch.zeros(2, 5, 6, 3)}, r"out: expected torch.uint8 \[2, 5, 6, 3\] on cpu, not torch.float32"),
        ({"out": torch.zeros(2, 3, 5, 6, dtype=torch.uint8).movedim(1, -1)}, "out: expected to be contiguous"),
    ],
)
def test_pixels_that_do_not_fit(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        causal_conv3d_pixels(**{"x": X, "weight": W[:3], "bias": torch.zeros(3), **change})


def test_traces_without_running() -> None:
    ops, utilities = torch.ops.liveavatar_kernels, ("test_schema", "test_faketensor")
    arguments = tuple(IN_PLACE.arguments(torch.float32).values())
    torch.library.opcheck(ops.causal_conv3d.default, (*arguments, "reference"), test_utils=utilities)
    out = torch.zeros(IN_PLACE.y_shape)
    torch.library.opcheck(ops.causal_conv3d_into.default, (*arguments, out, "reference"), test_utils=utilities)
    arguments = tuple(PIXELS.arguments(torch.float32).values())
    out = torch.zeros(PIXELS.y_shape, dtype=torch.uint8)
    torch.library.opcheck(ops.causal_conv3d_pixels.default, (*arguments, out, "reference"), test_utils=utilities)


@pytest.mark.parametrize("case", model_cases(WAN_14B), ids=lambda case: case.name)
def test_the_models_shapes_fit(case: Case) -> None:
    x, weight = (torch.empty(shape, device="meta") for shape in (case.x_shape, case.weight_shape))
    if case.pixels:
        y = causal_conv3d_pixels(x, weight, torch.empty(3, device="meta"))
    else:
        y = causal_conv3d(x, weight, upsample=case.upsample, interleaved=case.interleaved)
    assert y.shape == case.y_shape


def test_nothing_is_computed_in_vain_at_the_models_sizes() -> None:
    specs = kernel.aot_specs(WAN_14B, 90)
    assert len({str(spec.constexprs) for spec in specs}) == len(specs)
    for spec in specs:
        given = spec.constexprs
        assert given["CHANNELS_IN"] % given["DEPTH"] == 0
        if given["CHANNELS_OUT"] != 3:
            assert given["CHANNELS_OUT"] % (given["COLUMNS"] + given["MORE_COLUMNS"]) == 0


def test_the_two_last_levels_are_most_of_the_work() -> None:
    """9.7 TFLOP each in six convolutions, a block at 704x384."""
    half, full = (case for case in model_cases(WAN_14B)[:17] if case.form in ("level 2", "level 3"))
    assert 6 * half.flops == 6 * full.flops == pytest.approx(9.7e12, rel=0.01)
    assert full.x_shape == (14, 384, 704, 96)
