"""When an op's result is right: the tolerances of tests/kernels, at any size and on any device.

The truth is the op's reference at float64 or float32, the yardstick the same maths in torch at the arguments'
precision. What may be far smaller than the whole, a row of a result, is looked at on its own: a single wrong row of
135,000 is a relative error of 0.3%. Imports torch alone, for tests on machines that have little else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from liveavatar_kernels import (
    causal_conv3d,
    channel_norm,
    cross_attention,
    fp8_linear,
    modulated_norm,
    ring_attention,
    ring_write,
)
from liveavatar_kernels.cache import KeyValueCache
from liveavatar_kernels.causal_conv3d import cases as causal_conv3d_cases
from liveavatar_kernels.channel_norm import cases as channel_norm_cases
from liveavatar_kernels.e4m3 import E4M3, KV_TILE, quantize_rows
from liveavatar_kernels.modulated_norm import cases as modulated_norm_cases
from liveavatar_kernels.ring_write import cases as ring_write_cases
from liveavatar_kernels.tolerances import EMULATION_SQNR, FLIPPED_SHARE, LEAST_SQNR, TIMES_WORSE
from torch import Tensor
from torch.nn import functional as F

Arguments = dict[str, Any]
Outputs = tuple[Tensor, ...]

_WORST_ROW = 10.0
"""A row's error may be this many times what is allowed of the whole."""
_EMULATION_LONG_DB = 30.0
_LONG_WINDOW = 1024
"""Keys beyond which Hopper's FP8 accumulator, of about 22 bits, and the emulation's float32 part. Not measured."""
_FP8_ACCUMULATION = 1e-2
"""Error allowed to FP8 products on a GPU besides the yardstick's, for the same accumulator. Not measured."""
_FLOAT32 = 2**-21
"""Error allowed to float32 results on a GPU besides the yardstick's: exp2, rsqrt and division are approximate there."""
_SCALE = 1e-6
_FLIPPED = 1e-3
"""Error that e4m3 values which came out as the neighbour of the expected one may make together."""
_CHUNK = 1 << 25
_WIDE_ELEMENTS = 1 << 27
_WIDE_FLOPS = 1 << 33
"""Up to these sizes the truth is float64, beyond them float32."""


class Finding(NamedTuple):
    """One number that was checked; NaN never passes."""

    what: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def passes(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        return f"{self.what}: {self.measured:.3g}, allowed {'from' if self.at_least else 'up to'} {self.limit:.3g}"


Judge = Callable[[str, Outputs], list[Finding]]
"""Judges what the implementation of a name returned."""


class Error(NamedTuple):
    """Relative L2 errors.

    Attributes:
        total: of a whole tensor.
        worst: of the row, along the last axis, that fares worst; a row smaller than the average counts as average.
    """

    total: float
    worst: float

    @classmethod
    def of(cls, actual: Tensor, expected: Tensor) -> Error:
        """In float64, a part at a time; infinite where shapes differ."""
        if actual.shape != expected.shape:
            return cls(math.inf, math.inf)
        if not actual.numel():
            return cls(0.0, 0.0)
        noise, size = [], []
        rows = max(1, _CHUNK // actual.shape[-1])
        two = (x.reshape(-1, x.shape[-1]).split(rows) for x in (actual, expected))
        for ours, exact in zip(*two, strict=True):
            noise.append((ours.double() - exact.double()).square().sum(-1))
            size.append(exact.double().square().sum(-1))
        noises, sizes = torch.cat(noise), torch.cat(size)
        if not noises.any():
            return cls(0.0, 0.0)
        worst = (noises / sizes.clamp(min=sizes.mean())).max()
        return cls(float((noises.sum() / sizes.sum()).sqrt()), float(worst.sqrt()))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make what Python code allocates hold NaN, so that a result nobody wrote cannot pass for one."""

    def poisoned(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*arguments: Any, **keywords: Any) -> Tensor:
            out = real(*arguments, **keywords)
            return out.fill_(float("nan")) if out.is_floating_point() and not out.is_meta else out

        return make

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield


def duplicate(value: Any, storages: dict[int, Any] | None = None) -> Any:
    """A copy of arguments whose tensors keep their strides and share storages where they did."""
    storages = {} if storages is None else storages
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        copy = torch.empty(0, dtype=value.dtype, device=value.device)
        return copy.set_(storages[storage.data_ptr()], value.storage_offset(), value.shape, value.stride())
    if isinstance(value, dict):
        return {key: duplicate(item, storages) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [duplicate(item, storages) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes in one row, in which NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def judge_ring_attention(case: Any, arguments: Arguments) -> Judge:
    """Dense: as exact as SDPA over the same keys. e4m3: signal to noise against what is stored, and the emulation."""
    wide = torch.float64 if case.flops < _WIDE_FLOPS else torch.float32
    exact = ring_attention.reference.ring_attention(**{**arguments, "q": arguments["q"].to(wide)})
    if not case.quantized:
        plain = ring_attention.ring_attention(**arguments, implementation="sdpa")
        return lambda name, outputs: _as_exact("result", outputs[0], exact, plain)
    emulated = ring_attention.ring_attention(**arguments, implementation="emulation")
    rounding = EMULATION_SQNR if case.keys <= _LONG_WINDOW else _EMULATION_LONG_DB

    def judge(name: str, outputs: Outputs) -> list[Finding]:
        found = _signal("result", outputs[0], exact, LEAST_SQNR)
        return found + (_signal("result against emulation", outputs[0], emulated, rounding) if name == "triton" else [])

    return judge


def judge_ring_write(case: Any, arguments: Arguments) -> Judge:
    """Outputs: rotated q, then the tensors of the cache, which held NaN before. `arguments` stay as they are."""
    ours = {**arguments, "cache": duplicate(arguments["cache"])}
    ring_write.reference.ring_write(**ours)
    expected = [tensor for tensor in ours["cache"][:4] if tensor is not None]
    slots, slot = case.slots(), int(arguments["at"][0])
    shape = (2, case.cache_tokens, case.heads, case.head_dim)
    wide = torch.float64 if math.prod(shape) <= _WIDE_ELEMENTS else torch.float32
    wanted = {name: arguments[name] for name in ("q", "k", "v", "q_weight", "k_weight")}
    floats = {name: None if tensor is None else tensor.to(wide) for name, tensor in wanted.items()}
    k, v = torch.full((2, *shape), float("nan"), dtype=wide, device=arguments["q"].device)
    exact_q = ring_write.reference.ring_write(**{**arguments, **floats, "cache": KeyValueCache(k, v)})
    exact_k = k[slot, slots]
    plain_q, plain_k = ring_write_cases.in_torch(arguments)
    touched = torch.zeros(case.cache_tokens, dtype=torch.bool, device=k.device)
    touched[slots] = True

    def judge(name: str, outputs: Outputs) -> list[Finding]:
        q, keys, *others = outputs
        found = _as_exact("q", q, exact_q, plain_q)
        if case.quantized:
            return found + _quantized_cache([keys, *others], expected, slot, touched)
        found += _as_exact("stored k", keys[slot, slots], exact_k, plain_k)
        found.append(_differing("bytes of v", others[0], expected[1]))
        found.append(_differing("bytes of k in the other slot", keys[1 - slot], expected[0][1 - slot]))
        found.append(_differing("bytes of other k", keys[slot, ~touched], expected[0][slot, ~touched]))
        return found

    return judge


def _quantized_cache(ours: list[Tensor], expected: list[Tensor], slot: int, block: Tensor) -> list[Finding]:
    """The tokens of `slot` in `block` are the block's, tiles that hold any of them are written as a whole."""
    k, v, k_scale, v_scale = ours
    expected_k, expected_v, expected_k_scale, expected_v_scale = expected
    if k.dtype != E4M3 or k.shape != expected_k.shape:
        return [Finding("k: wrong dtype or shape", math.inf, 0)]
    tile = block.view(-1, KV_TILE).any(-1).repeat_interleave(KV_TILE)
    padding = tile & ~block
    keys, expected_keys = k.float(), expected_k.float()
    scales, expected_scales = k_scale.transpose(1, 2), expected_k_scale.transpose(1, 2)
    return [
        _differing("bytes of v", v, expected_v),
        _differing("bytes of the scales of v", v_scale, expected_v_scale),
        _differing("values of k in the other slot", keys[1 - slot], expected_keys[1 - slot]),
        _differing("values of k in other tiles", keys[slot, ~tile], expected_keys[slot, ~tile]),
        _differing("bytes of the scales of k in the other slot", scales[1 - slot], expected_scales[1 - slot]),
        _differing("bytes of the scales of k in other tiles", scales[slot, ~tile], expected_scales[slot, ~tile]),
        Finding("padding of k that is not zero", float(keys[slot, padding].ne(0).sum()), 0),
        Finding("scales of padding", Error.of(scales[slot, padding], expected_scales[slot, padding]).total, _SCALE),
        *_rounded(
            "k", keys[slot, block], scales[slot, block], expected_keys[slot, block], expected_scales[slot, block]
        ),
    ]


def judge_cross_attention(case: Any, arguments: Arguments) -> Judge:
    """As exact as SDPA over the text with all its padding."""
    q = arguments["q"]
    wide = torch.float64 if case.flops < _WIDE_FLOPS else torch.float32
    exact = cross_attention.reference.cross_attention(**{**arguments, "q": q.to(wide)})
    plain = cross_attention.cross_attention(**arguments, implementation="sdpa")
    return lambda name, outputs: (
        _as_exact("result", outputs[0], exact, plain) + _wrong_dtype(outputs[0].dtype != q.dtype)
    )


def judge_modulated_norm(case: Any, arguments: Arguments) -> Judge:
    """Outputs: residual, values, and for e4m3 their scales, judged against the norm of the residual as returned."""
    floats: Arguments = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    floats |= {"dtype": torch.float64, "residual_dtype": torch.float64 if case.branch else None}
    exact = modulated_norm.modulated_norm(**floats, implementation="reference")
    plain_residual, plain_values = modulated_norm_cases.in_torch(case, arguments)
    residual_dtype = arguments["residual_dtype"] or arguments["x"].dtype

    def judge(name: str, outputs: Outputs) -> list[Finding]:
        residual, values, *scale = outputs
        found = _as_exact("residual", residual, exact.residual, plain_residual)
        found += _wrong_dtype(values.dtype != arguments["dtype"] or residual.dtype != residual_dtype)
        if not case.quantized:
            return found + _as_exact("values", values, exact.values, plain_values)
        alone = {**floats, "x": residual.double(), "branch": None, "gate": None, "residual_dtype": None}
        normed = modulated_norm.modulated_norm(**alone, implementation="reference").values.float()
        return found + _rounded("values", values, scale[0], *quantize_rows(normed))

    return judge


def judge_fp8_linear(case: Any, arguments: Arguments) -> Judge:
    """As exact as torch over dequantised operands; a quantised result also as exact as quantising the dense one."""
    x, weight = arguments["x"], arguments["weight"]
    dtype = arguments.get("dtype", torch.bfloat16)

    def layer(dtype: torch.dtype) -> Tensor:
        wide = (x.values.double() * x.scale.double()[:, None]).to(dtype)
        wide_weight = (weight.double() * arguments["weight_scale"].double()[:, None]).to(dtype)
        y = F.linear(wide, wide_weight, None if arguments["bias"] is None else arguments["bias"].to(dtype))
        return F.gelu(y, approximate="tanh") if arguments["gelu"] else y

    exact, plain = layer(torch.float64), layer(dtype)
    least = _FP8_ACCUMULATION if exact.is_cuda else 0.0

    def judge(name: str, outputs: Outputs) -> list[Finding]:
        if not case.quantized:
            return _as_exact("result", outputs[0], exact, plain, least) + _wrong_dtype(outputs[0].dtype != dtype)
        dense = fp8_linear.fp8_linear(**arguments, dtype=dtype, implementation=name)
        found = _as_exact("dense result", dense, exact, plain, least) + _wrong_dtype(outputs[0].dtype != E4M3)
        return found + _rounded("result", outputs[0], outputs[1], *quantize_rows(dense))

    return judge


def judge_fp8_quantize(case: Any, arguments: Arguments) -> Judge:
    """Bit for bit."""
    values, scale = quantize_rows(arguments["x"].float())

    def judge(name: str, outputs: Outputs) -> list[Finding]:
        return [_differing("bytes of the scales", outputs[1], scale), _differing("bytes of x", outputs[0], values)]

    return judge


def judge_causal_conv3d(case: Any, arguments: Arguments) -> Judge:
    """Of pixels, some may be the neighbour of the expected one."""
    wide = torch.float64 if case.flops <= _WIDE_FLOPS else torch.float32
    given: Arguments = {name: v.to(wide) if isinstance(v, Tensor) else v for name, v in arguments.items()}
    plain = causal_conv3d_cases.in_torch(arguments)
    if case.pixels:
        exact = causal_conv3d.reference.to_bytes(causal_conv3d.reference.convolve_wide(**given))
        dtype, least = torch.uint8, _FLIPPED
    else:
        exact = causal_conv3d.reference.causal_conv3d(**given, out=None)
        dtype = arguments["x"].dtype
        least = math.sqrt(arguments["weight"][0].numel()) * 2**-24 if dtype == torch.float32 else 0.0
    return lambda name, outputs: (
        _as_exact("result", outputs[0], exact, plain, least) + _wrong_dtype(outputs[0].dtype != dtype)
    )


def judge_channel_norm(case: Any, arguments: Arguments) -> Judge:
    """The sum bit for bit."""
    x = arguments["x"]
    wide = torch.float64 if x.numel() <= _WIDE_ELEMENTS else torch.float32
    total = x.float()
    for added in (arguments["bias"], arguments["residual"]):
        total = total if added is None else total + added.float()
    total = total.to(x.dtype)
    exact = torch.empty_like(total, dtype=wide)
    gamma = arguments["gamma"].to(wide)
    channel_norm.reference.channel_norm(total.to(wide), gamma, None, None, arguments["silu"], None, exact)
    plain = channel_norm_cases.in_torch(arguments)[1]

    def judge(name: str, outputs: Outputs) -> list[Finding]:
        found = _as_exact("result", outputs[0], exact, plain) + _wrong_dtype(outputs[0].dtype != x.dtype)
        return found + [_differing("bytes of the sum", kept, total) for kept in outputs[1:]]

    return judge


def _as_exact(what: str, ours: Tensor, exact: Tensor, plain: Tensor, least: float = 0.0) -> list[Finding]:
    """Error of `ours` against twice that of `plain`, or `least`; every row against ten times as much."""
    error, yardstick = Error.of(ours, exact), Error.of(plain, exact)
    if ours.is_cuda and ours.dtype == torch.float32:
        least = max(least, _FLOAT32)
    allowed = max(TIMES_WORSE * yardstick.total, least)
    return [
        Finding(f"{what}: relative error", error.total, allowed),
        Finding(f"{what}: relative error of the worst row", error.worst, _WORST_ROW * max(yardstick.worst, allowed)),
    ]


def _signal(what: str, ours: Tensor, exact: Tensor, least: float) -> list[Finding]:
    """Signal to quantisation noise in dB; a row may have 20 dB less."""
    total, worst = (
        math.nan if math.isnan(error) else -20 * math.log10(max(error, 1e-30)) for error in Error.of(ours, exact)
    )
    return [
        Finding(f"{what}: dB", total, least, at_least=True),
        Finding(f"{what}: dB of the worst row", worst, least - 20 * math.log10(_WORST_ROW), at_least=True),
    ]


def _rounded(what: str, values: Tensor, scale: Tensor, expected: Tensor, expected_scale: Tensor) -> list[Finding]:
    """e4m3 values and scales that may differ where a value lies on the edge between two numbers."""
    if values.shape != expected.shape or scale.shape != expected_scale.shape:
        return [Finding(f"{what}: wrong shape", math.inf, 0)]
    stored, exact = (v.float() * s[..., None] for v, s in ((values, scale), (expected, expected_scale)))
    differing = (stored - exact).abs() > _SCALE * exact.abs()
    return [
        Finding(f"{what}: scales", Error.of(scale, expected_scale).total, _SCALE),
        Finding(f"{what}: share of other values", float(differing.float().mean()), FLIPPED_SHARE),
        Finding(f"{what}: relative error", Error.of(stored, exact).total, _FLIPPED),
    ]


def _differing(what: str, ours: Tensor, expected: Tensor) -> Finding:
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return Finding(f"differing {what}", math.inf, 0)
    return Finding(f"differing {what}", float(bits(ours).ne(bits(expected)).sum()), 0)


def _wrong_dtype(wrong: bool) -> list[Finding]:
    return [Finding("wrong dtype", math.inf, 0)] if wrong else []
