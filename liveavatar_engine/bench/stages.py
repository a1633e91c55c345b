"""Where a step's time goes: every operation on the device timed, and put down to a stage.

Operations are seen as torch dispatches them, so nothing in the model knows about it. What an operation belongs to
follows from its own name, from the parameters among its arguments, and from the module that is running.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..model import Network
from . import work

ONCE_PER_BLOCK = "audio, once per block"
_OPS = {
    "liveavatar_kernels::ring_write": work.RING_WRITE,
    "liveavatar_kernels::ring_attention": work.RING_ATTENTION,
    "liveavatar_kernels::modulated_norm": work.NORMS,
    "liveavatar_kernels::fp8_quantize": work.QUANTISE,
}
"""Ops that are a stage of their own wherever they run, but for audio injection."""
_NAMES = (
    (".self_attn.o", work.ATTENTION_OUTPUT),
    (".self_attn.", work.QKV),
    (".cross_attn.q", work.CROSS_QUERY),
    (".cross_attn.o", work.CROSS_OUTPUT),
    (".cross_attn", work.TEXT_ATTENTION),
    (".ffn.2", work.FFN_DOWN),
    (".ffn", work.FFN_UP),
    ("head", work.ENDS),
    ("patch_embedding", work.ENDS),
    ("cond_encoder", work.ENDS),
)
"""Parts of names of parameters and modules, the first that fits."""
_PREPARES = ("casual_audio_encoder", "injector_adain_layers", ".k.", ".v.", ".norm_k.")
"""Parts of names of parameters that make a block's audio inputs."""
_HEAD_START_CYCLES = 20_000_000
"""About 10 ms that a GPU waits at the start of a layer, so that launches never make it wait within one."""
_EMPTY_SPANS = 50


@dataclass(frozen=True)
class StageTimes:
    """What was measured over some steps.

    Attributes:
        ms: by stage, of all steps together; `work.REMAINDER` is what belongs to none.
        calls: operations by stage.
    """

    ms: dict[str, float]
    calls: dict[str, int]


@contextmanager
def timed_stages(network: Network, block_shape: Sequence[int]) -> Iterator[Callable[[], StageTimes]]:
    """Time what runs in the body, which must not be a replayed graph; call the result for what was found so far.

    Args:
        network: whose steps run.
        block_shape: of the latents of a block; outside the network, sums of such tensors are the Euler step.
    """
    probe = _Probe(network, tuple(block_shape))
    hooks = probe.follow(network)
    try:
        with probe:
            yield probe.times
    finally:
        for hook in hooks:
            hook.remove()


class _Probe(TorchDispatchMode):
    """Marks the beginning and the end of every operation."""

    def __init__(self, network: Network, block_shape: tuple[int, ...]) -> None:
        super().__init__()
        self._device = network.device
        self._on_gpu = network.device.type == "cuda"
        self._shape = block_shape
        self._names = {parameter.data_ptr(): name for name, parameter in network.named_parameters()}
        self._running: list[str] = []
        self._spans: list[tuple[str, Any, Any]] = []

    def follow(self, network: nn.Module) -> list[Any]:
        """Hooks that tell which module is running."""
        hooks = []
        for name, module in network.named_modules():
            hooks.append(module.register_forward_pre_hook(self._entering(name)))
            hooks.append(module.register_forward_hook(self._leaving))
        return hooks

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        if getattr(function, "is_view", False):
            return function(*arguments, **keywords)
        start = self._mark()
        result = function(*arguments, **keywords)
        end = self._mark()
        self._spans.append((self._stage(function, arguments), start, end))
        return result

    def times(self) -> StageTimes:
        """Sums over everything since the last call."""
        spans, self._spans = self._spans, []
        empty = self._empty_ms()
        ms: dict[str, float] = defaultdict(float)
        calls: dict[str, int] = defaultdict(int)
        for stage, start, end in spans:
            ms[stage] += max(0.0, self._between(start, end) - empty)
            calls[stage] += 1
        return StageTimes(dict(ms), dict(calls))

    def _stage(self, function: Any, arguments: tuple[Any, ...]) -> str:
        running = self._running[-1] if self._running else ""
        parameter = self._parameter(arguments)
        if parameter.startswith(("casual_audio_encoder", "audio_injector")) and _has(parameter, _PREPARES):
            return ONCE_PER_BLOCK
        if running.startswith("casual_audio_encoder") or (not running and parameter.startswith("audio_injector")):
            return ONCE_PER_BLOCK
        if any(name.startswith("audio_injector") for name in (running, parameter)):
            return work.AUDIO_INJECTION
        if function.name().split(".")[0] in _OPS:
            return _OPS[function.name().split(".")[0]]
        for name in (parameter, running):
            for part, stage in _NAMES:
                if part in name:
                    return stage
        return work.EULER if self._is_euler(function, arguments, bool(self._running)) else work.REMAINDER

    def _parameter(self, arguments: tuple[Any, ...]) -> str:
        """Name of the first of the network's parameters among the arguments, or ""."""
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.device == self._device:
                name = self._names.get(argument.data_ptr())
                if name is not None:
                    return name
        return ""

    def _is_euler(self, function: Any, arguments: tuple[Any, ...], in_network: bool) -> bool:
        arithmetic = function.name().startswith(("aten::add", "aten::mul", "aten::sub"))
        shapes = (tuple(a.shape[-len(self._shape) :]) for a in arguments if isinstance(a, Tensor))
        return arithmetic and not in_network and self._shape in shapes

    def _entering(self, name: str) -> Callable[..., None]:
        layer = name.startswith("blocks.") and name.count(".") == 1

        def enter(*_: Any) -> None:
            self._running.append(name)
            if layer and self._on_gpu:
                torch.cuda._sleep(_HEAD_START_CYCLES)

        return enter

    def _leaving(self, *_: Any) -> None:
        self._running.pop()

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self._on_gpu else (end - start) * 1e3

    def _empty_ms(self) -> float:
        """What a span without an operation takes, by median: it is no work. Waits for a GPU."""
        pairs = [(self._mark(), self._mark()) for _ in range(_EMPTY_SPANS)]
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        return median(self._between(*pair) for pair in pairs)


def _has(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)
