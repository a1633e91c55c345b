"""Stand-ins for packages that the reference imports and a machine may lack; they live only inside `packages`.

A package that is installed is used as it is. What a stand-in does not provide can be imported, because the reference
imports more than it calls, and says so when it is called.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError


@dataclass(frozen=True)
class StandIn:
    """Something of the reference that could not run as it is.

    Attributes:
        name: what was replaced.
        instead: what runs in its place.
        reason: why.
    """

    name: str
    instead: str
    reason: str


class StandInLog:
    """The stand-ins that were used, each once, in the order of their first use."""

    def __init__(self) -> None:
        self._used: dict[str, StandIn] = {}

    def use(self, name: str, instead: str, reason: str) -> None:
        self._used.setdefault(name, StandIn(name, instead, reason))

    @property
    def used(self) -> tuple[StandIn, ...]:
        return tuple(self._used.values())


@contextmanager
def packages(device: torch.device, log: StandInLog) -> Iterator[None]:
    """Let `diffusers`, `einops` and, on a GPU, `flash_attn` be imported where they are not installed.

    At the end `sys.modules` holds what it held before.
    """
    made: dict[str, ModuleType] = {}
    for package, provided in (("diffusers", _DIFFUSERS), ("einops", _EINOPS)):
        if importlib.util.find_spec(package) is None:
            made |= _modules(package, provided, log)
    attention = ("flash_attn", "flash_attn_interface")
    if device.type == "cuda" and all(importlib.util.find_spec(package) is None for package in attention):
        made |= {"flash_attn": _flash_attn(log)}
    before = {name: sys.modules[name] for name in made if name in sys.modules}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name, None)
        sys.modules.update(before)


class _Package(ModuleType):
    """A module whose names are handed out, and logged, when they are asked for."""

    def __init__(self, name: str, provided: Mapping[str, tuple[Any, str]], log: StandInLog) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, loader=None, is_package=True)
        self._provided, self._log = provided, log

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if name not in self._provided:
            return _absent(full)
        thing, instead = self._provided[name]
        package = self.__name__.partition(".")[0]
        self._log.use(full, instead, f"{package} is not installed")
        return thing


def _modules(
    package: str, provided: Mapping[str, Mapping[str, tuple[Any, str]]], log: StandInLog
) -> dict[str, ModuleType]:
    return {
        (full := f"{package}.{name}" if name else package): _Package(full, entries, log)
        for name, entries in provided.items()
    }


def _absent(name: str) -> type:
    """Something that can be imported and inherited from, but not made or called."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise InputError(f"the reference calls {name}, for which compare has no stand-in: install that package")

    return type(name.rpartition(".")[2], (), {"__init__": refuse})


class _ModelMixin(nn.Module):
    """A module that also finds, as attributes, what `_register_to_config` recorded of its constructor's arguments."""

    def __getattr__(self, name: str) -> Any:
        recorded = self.__dict__.get("recorded_config", {})
        return recorded[name] if name in recorded else super().__getattr__(name)

    @property
    def dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class _ConfigMixin:
    pass


def _register_to_config(constructor: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.__dict__["recorded_config"] = bound.arguments
        constructor(self, *args, **kwargs)

    return recording


class _AdaLayerNorm(nn.Module):
    """LN(x) (1 + scale) + shift, (shift, scale) = Linear(SiLU(embedding)): the form with an embedding given."""

    def __init__(
        self,
        embedding_dim: int,
        num_embeddings: int | None = None,
        output_dim: int | None = None,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        chunk_dim: int = 0,
    ) -> None:
        super().__init__()
        if num_embeddings is not None or chunk_dim != 1:
            raise InputError("the reference makes an AdaLayerNorm for which compare has no stand-in: install diffusers")
        doubled = output_dim or 2 * embedding_dim
        self.linear = nn.Linear(embedding_dim, doubled)
        self.norm = nn.LayerNorm(doubled // 2, norm_eps, norm_elementwise_affine)

    def forward(self, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
        """[batch, tokens, dim] with an embedding [batch, embedding_dim]."""
        assert temb is not None
        shift, scale = self.linear(F.silu(temb)).chunk(2, dim=1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None]


def rearrange(tensor: Tensor, pattern: str, **sizes: int) -> Tensor:
    """What einops' function of that name does for axes that are named, grouped by brackets or not."""
    source, target = (_groups(side) for side in pattern.split("->"))
    for group, size in zip(source, tensor.shape, strict=True):
        unknown = [axis for axis in group if axis not in sizes]
        known = math.prod(sizes[axis] for axis in group if axis in sizes)
        if unknown:
            sizes[unknown[0]] = size // known
    axes = [axis for group in source for axis in group]
    split = tensor.reshape([sizes[axis] for axis in axes])
    moved = split.permute([axes.index(axis) for group in target for axis in group])
    return moved.reshape([math.prod(sizes[axis] for axis in group) for group in target])


def _groups(side: str) -> list[list[str]]:
    """ "b (t n) c" -> [[b], [t, n], [c]]."""
    groups: list[list[str]] = []
    inside = False
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            groups.append([])
            inside = True
        elif word == ")":
            inside = False
        elif inside:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def _flash_attn(log: StandInLog) -> ModuleType:
    """FlashAttention's entry for sequences one behind the other, by torch's attention."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        **other: object,
    ) -> Tensor:
        check_plain(dropout_p, causal, window_size)
        count = len(cu_seqlens_q) - 1
        if count > 1 and (len(q) != count * max_seqlen_q or len(k) != count * max_seqlen_k):
            raise InputError(
                "the reference attends to sequences of several lengths, for which compare has no stand-in: "
                "install flash_attn"
            )
        queries, keys, values = (part.unflatten(0, (count, -1)) for part in (q, k, v))
        return attend(queries, keys, values, softmax_scale).flatten(0, 1)

    log.use(
        "flash_attn.flash_attn_varlen_func",
        "torch's scaled_dot_product_attention",
        "neither flash_attn nor flash_attn_interface is installed",
    )
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", loader=None)
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Full attention of [batch, queries, heads, head_dim] to [batch, keys, heads, head_dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def check_plain(dropout: float, causal: bool, window: tuple[int, int]) -> None:
    """Raise InputError unless attention is full, without dropout: the reference asks for nothing else."""
    if dropout or causal or tuple(window) != (-1, -1):
        raise InputError(
            f"the reference asks for attention with dropout {dropout}, causal {causal}, window {tuple(window)}, for "
            "which compare has no stand-in: install flash_attn"
        )


_MODULE = "torch.nn.Module with dtype, device and the recorded arguments"
_DIFFUSERS: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "": {},
    "configuration_utils": {
        "ConfigMixin": (_ConfigMixin, "an empty base class"),
        "register_to_config": (_register_to_config, "arguments recorded, and found as attributes"),
    },
    "models": {"ModelMixin": (_ModelMixin, _MODULE)},
    "models.modeling_utils": {"ModelMixin": (_ModelMixin, _MODULE)},
    "models.attention": {"AdaLayerNorm": (_AdaLayerNorm, "the same formula")},
    "loaders": {},
    "utils": {},
}
_EINOPS: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "": {"rearrange": (rearrange, "the same by reshape and permute")},
}
