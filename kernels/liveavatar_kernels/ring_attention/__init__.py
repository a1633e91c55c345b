"""Attention of a block's queries over the ring of its timestep and the sink that all timesteps share.

softmax(q [ring | fixed | R(s) moved]^T / sqrt(head_dim)) [ring | fixed | moved]. The moved keys are stored rotated at
their base positions and stand at a position that is a uniform temporal shift s further: q . R(s) k = (R(-s) q) . k, so
the query is rotated back once and no key is touched.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..cache import MOVED, KeyValueCache, Window
from ..dispatch import ANYWHERE, Implementation, Op, never_absent, on_device, refuses_e4m3, triton_absent
from . import emulation, library, reference

_GLUON_TRITON = ((3, 6), (3, 9))
"""Oldest and newest Triton whose Gluon, an interface that still changes, the kernel is known to compile with."""


def _triton(*arguments: Any) -> Tensor:
    from . import kernel

    return kernel.ring_attention(*arguments)


def _gluon(*arguments: Any) -> Tensor:
    from . import gluon

    return gluon.ring_attention(*arguments)


def _gluon_absent(device: torch.device) -> str | None:
    """Why the Gluon kernel cannot run on a device: it is written for Hopper."""
    if device.type != "cuda":
        return "needs a CUDA device"
    reason = triton_absent(device)
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"sm_{capability[0]}{capability[1]}: written for sm_90"
    import triton

    oldest, newest = _GLUON_TRITON
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    if not oldest <= version <= newest or importlib.util.find_spec("triton.experimental.gluon") is None:
        known = " to ".join(f"{major}.{minor}" for major, minor in _GLUON_TRITON)
        return f"needs the Gluon of Triton {known}, not that of {triton.__version__}"
    return None


OP = Op(
    "ring_attention",
    (
        Implementation("triton", _triton, triton_absent, automatic=("cuda",)),
        Implementation("emulation", emulation.ring_attention, never_absent, automatic=ANYWHERE),
        Implementation("reference", reference.ring_attention, never_absent, automatic=ANYWHERE),
        Implementation("gluon", _gluon, _gluon_absent),
        *library.IMPLEMENTATIONS,
    ),
)


def ring_attention(
    q: Tensor,
    ring: KeyValueCache,
    sink: KeyValueCache,
    window: Window,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Attend to everything that `window` shows of `ring` and `sink`.

    Args:
        q: [tokens, heads, head_dim], rotated at the block's positions; head_dim 32, 64 or 128.
        ring, sink: caches of one dtype, q's or e4m3; no token outside the window is read.
        window: on q's device. At least one of its segments is not empty.
        implementation: "triton", "reference" (dequantises e4m3 and computes in float32), "emulation" (e4m3 caches
            only: rounds where the kernel rounds), "gluon" (bf16 and fp16 on Hopper; unmeasured, and never picked), or a
            library's, "sdpa", "cudnn", "fa2" or "fa3"; None picks.

    Returns:
        [tokens, heads, head_dim] in q's dtype. The same bits for the same arguments.

    Raises:
        ValueError: shapes or dtypes do not fit.
        KernelUnavailableError: `implementation` cannot run here.
    """
    _, heads, head_dim = q.shape
    if head_dim not in (32, 64, 128):
        raise ValueError(f"q: head_dim must be 32, 64 or 128, not {head_dim}")
    for name, cache in (("ring", ring), ("sink", sink)):
        cache.check(name, heads, head_dim)
        if cache.k.dtype != ring.k.dtype or (not cache.quantized and cache.k.dtype != q.dtype):
            raise ValueError(f"{name}: expected both caches in {q.dtype}, as q, or both in e4m3, not {cache.k.dtype}")
    groups = window.segments.shape[0]
    if window.segments.dtype != torch.int32 or window.segments.shape != (groups, MOVED + 1, 2) or heads % groups:
        raise ValueError(
            f"window.segments: expected int32 [groups, {MOVED + 1}, 2] with groups dividing {heads} heads, "
            f"not {window.segments.dtype} {list(window.segments.shape)}"
        )
    if window.slots.dtype != torch.int32 or window.slots.shape != (2,):
        raise ValueError(f"window.slots: expected int32 [2], not {window.slots.dtype} {list(window.slots.shape)}")
    if window.shift.shape[0] != 2 or window.shift.shape[1] > head_dim // 2:
        raise ValueError(f"window.shift: expected [2, at most {head_dim // 2}], not {list(window.shift.shape)}")
    e4m3 = refuses_e4m3(q.device, ring.quantized)

    def refuses(name: str) -> str | None:
        if name == "triton" and q.dtype == torch.float64:
            return "no float64"
        if name == "emulation" and not ring.quantized:
            return "only for e4m3 caches"
        if name == "gluon" and (ring.quantized or q.dtype not in (torch.bfloat16, torch.float16)):
            return "only for bf16 and fp16 caches"
        return e4m3(name)

    chosen = OP.choose(q.device, implementation, refuses=refuses)
    return _custom_op(q, *ring, *sink, *window, chosen)


@torch.library.custom_op("liveavatar_kernels::ring_attention", mutates_args=())
def _custom_op(
    q: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_k_scale: Tensor | None,
    ring_v_scale: Tensor | None,
    ring_run_tokens: int,
    sink_k: Tensor,
    sink_v: Tensor,
    sink_k_scale: Tensor | None,
    sink_v_scale: Tensor | None,
    sink_run_tokens: int,
    slots: Tensor,
    segments: Tensor,
    shift: Tensor,
    implementation: str,
) -> Tensor:
    ring = KeyValueCache(ring_k, ring_v, ring_k_scale, ring_v_scale, ring_run_tokens)
    sink = KeyValueCache(sink_k, sink_v, sink_k_scale, sink_v_scale, sink_run_tokens)
    with on_device(q.device):
        return OP[implementation].run(q, ring, sink, Window(slots, segments, shift))


@_custom_op.register_fake
def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)
