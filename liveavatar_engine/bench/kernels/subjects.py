"""What is measured: every op's cases, the ways to compute them, and when a result is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from liveavatar_kernels import (
    causal_conv3d,
    channel_norm,
    cross_attention,
    fp8_linear,
    fp8_quantize,
    modulated_norm,
    ring_attention,
    ring_write,
)
from liveavatar_kernels.cache import MOVED, Window
from liveavatar_kernels.causal_conv3d import cases as causal_conv3d_cases
from liveavatar_kernels.channel_norm import cases as channel_norm_cases
from liveavatar_kernels.cross_attention import cases as cross_attention_cases
from liveavatar_kernels.dispatch import Op
from liveavatar_kernels.e4m3 import Quantized, quantize_rows
from liveavatar_kernels.fp8_linear import cases as fp8_linear_cases
from liveavatar_kernels.fp8_quantize import cases as fp8_quantize_cases
from liveavatar_kernels.model_sizes import ModelSizes
from liveavatar_kernels.modulated_norm import cases as modulated_norm_cases
from liveavatar_kernels.ring_attention import cases as ring_attention_cases
from liveavatar_kernels.ring_attention import library
from liveavatar_kernels.ring_write import cases as ring_write_cases
from liveavatar_kernels.rotation import rotate_pairs
from torch import Tensor

from . import checks
from .checks import Arguments, Judge, Outputs

ONE_BUFFER = ", one buffer"


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Attributes:
        implementation: its name; that of an op's implementation, or one with ONE_BUFFER behind it.
        library: whether it is somebody else's kernel, which ours are compared with.
        run: takes what `prepare` made of the arguments, and is what is timed.
        prepare: is not timed.
        absent: why it cannot run on the device.
    """

    implementation: str
    library: bool
    run: Callable[[Any], Outputs]
    prepare: Callable[[Arguments], Any] = lambda arguments: arguments
    absent: str | None = None


@dataclass(frozen=True)
class Subject:
    """An op, or two that are timed together.

    Attributes:
        name: the op's, or the names of both.
        op: whose implementations are compared.
        cases: the small ones of the tests.
        model_cases: those of a model.
        run: the public op: case, arguments, name of the implementation.
        judge: how results are judged; it leaves the arguments as they are.
        libraries: names of the op's implementations that are libraries.
        extend: what a pair of ops adds to the arguments of the second.
    """

    name: str
    op: Op
    cases: tuple[Any, ...]
    model_cases: Callable[[ModelSizes], tuple[Any, ...]]
    run: Callable[[Any, Arguments, str | None], Outputs]
    judge: Callable[[Any, Arguments], Judge]
    libraries: tuple[str, ...] = ()
    extend: Callable[[Arguments, torch.dtype], Arguments] = lambda arguments, dtype: arguments

    def arguments(self, case: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        """Random, on the device."""
        return self.extend(case.arguments(dtype, str(device), seed), dtype)

    def flops(self, case: Any) -> int | None:
        return getattr(case, "flops", None)

    def bytes(self, case: Any) -> int:
        """Least traffic of all ops in it."""
        first = 0
        if self is PAIR:
            first = fp8_quantize_cases.Case("", case.tokens, case.in_features).bytes
        return first + case.bytes

    def dtype(self, case: Any) -> str:
        """What it computes in, or writes."""
        return "e4m3" if self.op is fp8_linear.OP or getattr(case, "quantized", self is FP8_QUANTIZE) else "bf16"

    def rivals(self, case: Any) -> str:
        """Name of the case whose libraries are the ones to beat.

        No library attends to our e4m3 caches: those that can dequantise them first, which nobody would do.
        """
        if self is RING_ATTENTION and case.quantized:
            return case.name.removesuffix(", e4m3")
        return case.name

    def candidates(self, case: Any, device: torch.device) -> list[Candidate]:
        """Every implementation of the op, and each attention library once more over one buffer."""
        found = []
        for implementation in self.op.implementations:
            name = implementation.name
            one = Candidate(
                name,
                name in self.libraries,
                partial(self._run, case, name),
                absent=implementation.absent(device),
            )
            attention = _attention(self.op, name)
            if attention is not None:
                one = replace(one, run=partial(_on_the_host, self.op, name), prepare=_window_on_the_host)
            if self.op is cross_attention.OP and one.library:
                one = replace(one, run=_attend_to_texts, prepare=_with_all_padding)
            found.append(one)
            if attention is not None and not case.quantized and len(case.segments) == 1:
                over = replace(
                    one, implementation=name + ONE_BUFFER, run=partial(_attend, attention), prepare=_one_buffer
                )
                found.append(over)
        return found

    def _run(self, case: Any, implementation: str, arguments: Arguments) -> Outputs:
        return self.run(case, arguments, implementation)


def _attention(op: Op, name: str) -> library.Attention | None:
    """The library's attention behind an implementation that copies everything into one buffer first."""
    run = op[name].run
    return run.args[0] if isinstance(run, partial) and run.func is library.over_one_buffer else None


def _window_on_the_host(arguments: Arguments) -> Arguments:
    """A library's integers lie where it reads them: neither a sync nor Python's time is to count against it."""
    slots, segments, shift = arguments["window"]
    return {**arguments, "window": Window(slots.cpu(), segments.cpu(), shift)}


def _on_the_host(op: Op, name: str, arguments: Arguments) -> Outputs:
    return (op[name].run(**arguments),)


@dataclass(frozen=True)
class _Buffer:
    """What a library would want: everything in one buffer, and only the moved keys to rotate before each call."""

    q: Tensor
    k: Tensor
    v: Tensor
    moved: Tensor
    first: int
    shift: Tensor


def _one_buffer(arguments: Arguments) -> _Buffer:
    q, window = arguments["q"], arguments["window"]
    segments = ring_attention.reference.gather(arguments["ring"], arguments["sink"], window, 0, slice(None))
    k, v = torch.cat([k for _, k, _ in segments]), torch.cat([v for _, _, v in segments])
    row, moved, _ = segments[-1]
    moved = moved if row == MOVED else k[:0]
    return _Buffer(q, k, v, moved.clone(), len(k) - len(moved), window.shift)


def _attend(attention: library.Attention, buffer: _Buffer) -> Outputs:
    if len(buffer.moved):
        cos, sin = buffer.shift
        buffer.k[buffer.first :] = rotate_pairs(buffer.moved, cos[None], sin[None])
    return (attention(buffer.q[None], buffer.k[None], buffer.v[None])[0],)


def _with_all_padding(arguments: Arguments) -> Arguments:
    """Keys and values with all padding, as they are where nobody collapses it: computed once, not in a call."""
    texts = cross_attention.library.padded(*(arguments[name] for name in ("k", "v", "view")))
    return {**{name: arguments[name] for name in ("q", "norm_weight", "eps")}, "texts": texts}


def _attend_to_texts(arguments: Arguments) -> Outputs:
    return (cross_attention.library.attend(**arguments),)


def _run_ring_attention(case: Any, arguments: Arguments, implementation: str | None) -> Outputs:
    return (ring_attention.ring_attention(**arguments, implementation=implementation),)


def _run_ring_write(case: Any, arguments: Arguments, implementation: str | None) -> Outputs:
    q = ring_write.ring_write(**arguments, implementation=implementation)
    return (q, *(tensor for tensor in arguments["cache"][:4] if tensor is not None))


def _run_cross_attention(case: Any, arguments: Arguments, implementation: str | None) -> Outputs:
    return (cross_attention.cross_attention(**arguments, implementation=implementation),)


def _run_modulated_norm(case: Any, arguments: Arguments, implementation: str | None) -> Outputs:
    normed = modulated_norm.modulated_norm(**arguments, implementation=implementation)
    return tuple(tensor for tensor in normed if tensor is not None)


def _run_fp8_linear(case: Any, arguments: Arguments, implementation: str | None) -> Outputs:
    if case.quantized:
        return tuple(fp8_linear.fp8_linear_quantized(**arguments, implementation=implementation))
    return (fp8_linear.fp8_linear(**arguments, implementation=implementation),)


def _run_fp8_quantize(case: Any, arguments: Arguments, implementation: str | None) -> Outputs:
    return tuple(fp8_quantize.fp8_quantize(**arguments, implementation=implementation))


def _run_causal_conv3d(case: Any, arguments: Arguments, implementation: str | None) -> Outputs:
    run = causal_conv3d.causal_conv3d_pixels if case.pixels else causal_conv3d.causal_conv3d
    return (run(**arguments, implementation=implementation),)


def _run_channel_norm(case: Any, arguments: Arguments, implementation: str | None) -> Outputs:
    normed = channel_norm.channel_norm(**arguments, implementation=implementation)
    return (normed.values, normed.total) if case.total else (normed.values,)


def _run_pair(case: Any, arguments: Arguments, implementation: str | None) -> Outputs:
    """Whatever multiplies, our quantiser is before it: libraries have none by row."""
    rest = {name: value for name, value in arguments.items() if name != "dense"}
    return _run_fp8_linear(case, {**rest, "x": fp8_quantize.fp8_quantize(arguments["dense"])}, implementation)


def _with_dense(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """x in `dtype` beside x as the quantiser makes it of that."""
    x = arguments["x"]
    dense = (x.values.float() * x.scale[:, None]).to(dtype)
    return {**arguments, "x": Quantized(*quantize_rows(dense)), "dense": dense}


def _judge_pair(case: Any, arguments: Arguments) -> Judge:
    return checks.judge_fp8_linear(case, {name: value for name, value in arguments.items() if name != "dense"})


RING_ATTENTION = Subject(
    "ring_attention",
    ring_attention.OP,
    ring_attention_cases.CASES,
    ring_attention_cases.model_cases,
    _run_ring_attention,
    checks.judge_ring_attention,
    tuple(implementation.name for implementation in library.IMPLEMENTATIONS),
)
RING_WRITE = Subject(
    "ring_write",
    ring_write.OP,
    ring_write_cases.CASES,
    ring_write_cases.model_cases,
    _run_ring_write,
    checks.judge_ring_write,
)
CROSS_ATTENTION = Subject(
    "cross_attention",
    cross_attention.OP,
    cross_attention_cases.CASES,
    cross_attention_cases.model_cases,
    _run_cross_attention,
    checks.judge_cross_attention,
    tuple(implementation.name for implementation in cross_attention.library.IMPLEMENTATIONS),
)
MODULATED_NORM = Subject(
    "modulated_norm",
    modulated_norm.OP,
    modulated_norm_cases.CASES,
    modulated_norm_cases.model_cases,
    _run_modulated_norm,
    checks.judge_modulated_norm,
)
FP8_LINEAR = Subject(
    "fp8_linear",
    fp8_linear.OP,
    fp8_linear_cases.CASES,
    fp8_linear_cases.model_cases,
    _run_fp8_linear,
    checks.judge_fp8_linear,
    ("cublaslt",),
)
PAIR = replace(FP8_LINEAR, name="fp8_quantize + fp8_linear", run=_run_pair, judge=_judge_pair, extend=_with_dense)
FP8_QUANTIZE = Subject(
    "fp8_quantize",
    fp8_quantize.OP,
    fp8_quantize_cases.CASES,
    fp8_quantize_cases.model_cases,
    _run_fp8_quantize,
    checks.judge_fp8_quantize,
)
CAUSAL_CONV3D = Subject(
    "causal_conv3d",
    causal_conv3d.OP,
    causal_conv3d_cases.CASES,
    causal_conv3d_cases.model_cases,
    _run_causal_conv3d,
    checks.judge_causal_conv3d,
    ("cudnn",),
)
CHANNEL_NORM = Subject(
    "channel_norm",
    channel_norm.OP,
    channel_norm_cases.CASES,
    channel_norm_cases.model_cases,
    _run_channel_norm,
    checks.judge_channel_norm,
)
SUBJECTS = (
    RING_ATTENTION,
    RING_WRITE,
    CROSS_ATTENTION,
    MODULATED_NORM,
    FP8_LINEAR,
    PAIR,
    FP8_QUANTIZE,
    CAUSAL_CONV3D,
    CHANNEL_NORM,
)
