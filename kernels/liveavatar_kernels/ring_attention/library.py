"""Attention libraries behind the op, for comparison and fallback: moved keys are rotated, all is one buffer first."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cache import MOVED, KeyValueCache, Window
from ..dispatch import Implementation, never_absent
from ..rotation import rotate_pairs
from .reference import gather

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[1, tokens, heads, head_dim] queries, keys and values to outputs of the queries' shape."""


def over_one_buffer(
    attention: Attention, q: Tensor, ring: KeyValueCache, sink: KeyValueCache, window: Window
) -> Tensor:
    """As the op; everything the window shows is copied to one buffer, moved keys rotated, in q's dtype.

    Reads the window's integers on the host.
    """
    out = torch.empty_like(q)
    for group, heads in enumerate(torch.arange(q.shape[1]).chunk(window.segments.shape[0])):
        chosen = slice(int(heads[0]), int(heads[-1]) + 1)
        keys, values = [], []
        for row, k, v in gather(ring, sink, window, group, chosen):
            keys.append(rotate_pairs(k, *(table[None] for table in window.shift)) if row == MOVED else k)
            values.append(v)
        k, v = (torch.cat(parts).to(q.dtype)[None] for parts in (keys, values))
        out[:, chosen] = attention(q[None, :, chosen], k, v)[0]
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def _flash_attention_2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def _flash_attention_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def _package_absent(package: str, least: tuple[int, int], device: torch.device) -> str | None:
    reason = _gpu_absent(least, device)
    if reason is None and importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    return reason


def _gpu_absent(least: tuple[int, int], device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.get_device_capability(device) < least:
        return f"needs sm_{least[0]}{least[1]} or newer"
    return None


IMPLEMENTATIONS = (
    Implementation("sdpa", partial(over_one_buffer, _sdpa), never_absent),
    Implementation("cudnn", partial(over_one_buffer, _cudnn), partial(_gpu_absent, (8, 0))),
    Implementation("fa2", partial(over_one_buffer, _flash_attention_2), partial(_package_absent, "flash_attn", (8, 0))),
    Implementation(
        "fa3", partial(over_one_buffer, _flash_attention_3), partial(_package_absent, "flash_attn_interface", (9, 0))
    ),
)
