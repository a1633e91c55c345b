"""Ring write in plain PyTorch: the float32 truth that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache import KeyValueCache
from ..e4m3 import KV_TILE, padded_to_tile, quantize_rows, scale_of, to_e4m3
from ..rotation import Angles, rotate_pairs


def ring_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    angles: Angles,
    cache: KeyValueCache,
    at: Tensor,
    *,
    eps: float,
) -> Tensor:
    """As the op; arithmetic in float32, or float64 for float64 input. Reads `at` on the host."""
    cos, sin = angles.table()
    rotated_q, rotated_k = (
        rotate_pairs(_normalised(x, weight, eps), cos, sin) for x, weight in ((q, q_weight), (k, k_weight))
    )
    slot, start = at.tolist()
    if cache.quantized:
        _store_quantized(cache, slot, start, rotated_k, v)
    else:
        for stored, new in ((cache.k[slot], rotated_k), (cache.v[slot], v)):
            first = min(len(new), cache.tokens - start)
            stored[start : start + first].copy_(new[:first])
            stored[: len(new) - first].copy_(new[first:])
    return rotated_q.to(q.dtype)


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over all heads of [..., heads, head_dim] together where a weight is given; in float32 or float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    if weight is None:
        return wide
    flat = wide.flatten(-2)
    return F.rms_norm(flat, flat.shape[-1:], weight.to(wide.dtype), eps).view_as(x)


def _store_quantized(cache: KeyValueCache, slot: int, start: int, k: Tensor, v: Tensor) -> None:
    """Store in whole tiles from the one that holds `start`; what the block leaves of them is zeroed."""
    assert cache.k_scale is not None
    assert cache.v_scale is not None
    first = start // KV_TILE * KV_TILE
    before, covered = start - first, padded_to_tile(start - first + len(k))
    padded = (0, 0, 0, 0, before, covered - before - len(k))
    keys, key_scales = quantize_rows(F.pad(k.float(), padded))
    tiles = F.pad(v.float(), padded).unflatten(0, (-1, KV_TILE))
    value_scales = scale_of(tiles.abs().amax(dim=(1, 3)))
    values = to_e4m3(tiles, value_scales[:, None, :, None]).flatten(0, 1)
    here = slice(first, first + covered)
    cache.k[slot, here] = keys
    cache.v[slot, :, :, here] = values.permute(1, 2, 0)
    cache.k_scale[slot, :, here] = key_scales.T
    cache.v_scale[slot, :, first // KV_TILE : (first + covered) // KV_TILE] = value_scales.T
