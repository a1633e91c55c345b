"""What in the reference's own code cannot run as it is: literals of one size and device, CUDA's autocast and attention.

Each is a context manager that puts everything back, and logs what it replaced.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...config.engine import SINK_DISTANCES
from .stand_ins import StandInLog, attend, check_plain

_LITERAL_DIM = 5120
"""Width of the 14B model, which `_forward_sink` writes out where it makes zero tokens."""
_HALVES = (torch.float16, torch.bfloat16)
_ON_CPU = "CUDA only; this runs on a CPU"


@contextmanager
def own_packages(root: str, folders: dict[str, str]) -> Iterator[None]:
    """Make the checkout's packages importable without running their `__init__` files, or writing into their folders.

    At the end no module below `root` is left in `sys.modules` but what was there before.

    Args:
        root: name of the outermost package.
        folders: package name -> its folder.
    """
    before = {name: module for name, module in sys.modules.items() if _below(name, root)}
    for name in before:
        del sys.modules[name]
    for name, folder in folders.items():
        package = ModuleType(name)
        package.__path__ = [folder]
        sys.modules[name] = package
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, package)
    try:
        with mock.patch.object(sys, "dont_write_bytecode", True):
            yield
    finally:
        for name in [name for name in sys.modules if _below(name, root)]:
            del sys.modules[name]
        sys.modules.update(before)


def _below(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.")


@contextmanager
def compile_switch(compiled: bool) -> Iterator[None]:
    """The environment variable by which the reference decides on torch.compile when it is imported."""
    with mock.patch.dict(os.environ, {"ENABLE_COMPILE": "true" if compiled else "false"}):
        yield


@contextmanager
def eager(log: StandInLog) -> Iterator[None]:
    """Let `torch.compile` leave functions as they are."""

    def uncompiled(function: Callable[..., Any] | None = None, **options: object) -> Callable[..., Any]:
        log.use("torch.compile", "the function itself", "compiling for a CPU is not asked for")
        return (lambda decorated: decorated) if function is None else function

    with mock.patch.object(torch, "compile", uncompiled):
        yield


@contextmanager
def sink_distance(distance: int, log: StandInLog) -> Iterator[None]:
    """Let the reference's draw of the sink distance be `distance`; other draws stay."""
    draw = random.randint

    def randint(low: int, high: int) -> int:
        return distance if (low, high) == SINK_DISTANCES else draw(low, high)

    log.use("random.randint", f"the fixed sink distance {distance}", "it is drawn anew in every call")
    with mock.patch.object(random, "randint", randint):
        yield


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let modules be made without storage for their parameters; other tensors are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


@contextmanager
def cuda_literals(device: torch.device, log: StandInLog) -> Iterator[None]:
    """Let `.to("cuda")`, `.cuda()` and `device="cuda"` mean `device`."""
    if device.type == "cuda":
        yield
        return

    class Redirect(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.cuda:
                log.use('the literal "cuda"', f'"{device}"', _ON_CPU)
                return args[0].to(device)
            wanted = {**(kwargs or {})}
            if any(_is_cuda(value) for value in (*args, *wanted.values())):
                log.use('the literal "cuda"', f'"{device}"', _ON_CPU)
                args = tuple(device if _is_cuda(value) else value for value in args)
                wanted = {name: device if _is_cuda(value) else value for name, value in wanted.items()}
            return func(*args, **wanted)

    with Redirect():
        yield


def _is_cuda(value: object) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


@contextmanager
def width_literal(dim: int, log: StandInLog) -> Iterator[None]:
    """Let the zero tokens that `_forward_sink` makes have the model's width."""
    if dim == _LITERAL_DIM:
        yield
        return

    class Narrow(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.zeros and args and isinstance(args[0], list) and args[0][1:3] == [_LITERAL_DIM, 0]:
                log.use(f"the literal {_LITERAL_DIM} in _forward_sink", str(dim), "the width of another model")
                args = ([args[0][0], dim, *args[0][2:]], *args[1:])
            return func(*args, **(kwargs or {}))

    with Narrow():
        yield


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype, log: StandInLog) -> Iterator[None]:
    """CUDA's autocast, on a CPU: regions in float32 compute their products in it, others are torch's for the CPU."""
    if device.type == "cuda":
        yield
        return
    real = torch.amp.autocast

    def region(chosen: torch.dtype | None, enabled: bool) -> Any:
        if dtype not in _HALVES or not enabled:
            return real(device.type, enabled=False)
        return _Float32Region(real) if chosen == torch.float32 else real(device.type, dtype=chosen)

    def cuda_amp(enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True) -> Any:
        return region(dtype, enabled)

    def amp(
        device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, cache_enabled: bool | None = None
    ) -> Any:
        return region(dtype, enabled) if device_type == "cuda" else real(device_type, dtype, enabled, cache_enabled)

    instead = "torch's for the CPU, with float32 regions by casting the inputs of products, sums and norms"
    log.use("torch.cuda.amp.autocast, torch.amp.autocast", instead, _ON_CPU)
    with mock.patch.object(torch.cuda.amp, "autocast", cuda_amp), mock.patch.object(torch.amp, "autocast", amp):
        yield


class _Float32Region(contextlib.ContextDecorator):
    """What `autocast(dtype=torch.float32)` does on CUDA, where a CPU has no such region."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self._real, self._open = real, ExitStack()

    def __enter__(self) -> None:
        self._open.enter_context(self._real("cpu", enabled=False))
        self._open.enter_context(_Widen())

    def __exit__(self, *exception: object) -> None:
        self._open.close()


class _Widen(TorchFunctionMode):
    """Casts the half-precision inputs of what autocast would cast to float32."""

    _CASTS = frozenset(
        {F.linear, F.conv1d, F.conv3d, F.layer_norm, torch.matmul, torch.sum, Tensor.sum, Tensor.matmul, torch.conv1d}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wanted = kwargs or {}
        if func in self._CASTS:
            args = tuple(_wide(value) for value in args)
            wanted = {name: _wide(value) for name, value in wanted.items()}
        return func(*args, **wanted)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value


@contextmanager
def attention(module: ModuleType | None, device: torch.device, dtype: torch.dtype, log: StandInLog) -> Iterator[None]:
    """Attention of the reference's module `module`, where its kernels cannot run, by torch's own.

    FlashAttention and cuDNN's attention need CUDA, and cuDNN's needs half precision and a GPU that it supports.
    """
    if module is None:
        yield
        return
    with ExitStack() as replaced:
        why = _ON_CPU if device.type == "cpu" else _without_cudnn(device, dtype)
        instead = "torch's scaled_dot_product_attention"
        if dtype not in _HALVES:
            instead += ", in float32 where FlashAttention takes bf16"
        if why is not None:
            log.use("cudnn_attention_forward_with_lse", instead, why)
            replaced.enter_context(mock.patch.object(module, "cudnn_attention_forward_with_lse", _cudnn_attention))
        if device.type == "cpu":
            log.use("flash_attention", instead, why or _ON_CPU)
            replaced.enter_context(mock.patch.object(module, "flash_attention", _flash_attention))
        yield


def _without_cudnn(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why cuDNN's attention does not run, or None where it does."""
    probe = torch.zeros(1, 1, 16, 64, dtype=dtype, device=device)
    try:
        torch.ops.aten._scaled_dot_product_cudnn_attention(probe, probe, probe, None, True)
    except RuntimeError as error:
        return f"cuDNN's attention does not run here in {dtype}: {str(error).strip().splitlines()[0]}"
    return None


def _cudnn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    check_plain(dropout_p, is_causal or attn_mask is not None, (-1, -1))
    return attend(q, k, v, scale)


def _flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    version: int | None = None,
) -> Tensor:
    """[batch, tokens, heads, head_dim]; entry b attends to its first k_lens[b] keys."""
    check_plain(dropout_p, causal or q_lens is not None, window_size)
    scaled = q.to(v.dtype) if q_scale is None else q.to(v.dtype) * q_scale
    keys = k.to(v.dtype)
    if k_lens is None or all(length >= k.shape[1] for length in k_lens.tolist()):
        return attend(scaled, keys, v, softmax_scale).to(q.dtype)
    rows = [
        attend(scaled[[row]], keys[[row], :length], v[[row], :length], softmax_scale)
        for row, length in enumerate(k_lens.tolist())
    ]
    return torch.cat(rows).to(q.dtype)


@contextmanager
def unrounded() -> Iterator[None]:
    """Let a float32 model compute without the reference's own roundings: casts to half precision change nothing.

    These are the float16 table of rotary angles, which becomes float64, and bf16 in front of `norm3`.
    """

    class Keep(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.to and len(args) == 2 and args[1] in _HALVES and not kwargs:
                return args[0].double() if args[1] == torch.float16 else args[0]
            return func(*args, **(kwargs or {}))

    with Keep():
        yield
