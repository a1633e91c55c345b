"""Device functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

_AMAX_FLOOR = tl.constexpr(1e-12)
_INVERSE_MAX = tl.constexpr(1 / 448.0)
_MAX = tl.constexpr(448.0)


@triton.jit
def rotate_tile(x, cos, sin, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Rotate adjacent pairs of float32 x [ROWS, DIM]; cos and sin [ROWS or 1, DIM / 2]."""
    even, odd = tl.split(tl.reshape(x, (ROWS, DIM // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, DIM))


@triton.jit
def row_scale(amax):
    """e4m3 scale of a largest magnitude, as `liveavatar_kernels.e4m3.scale_of`."""
    return tl.maximum(amax, _AMAX_FLOOR) * _INVERSE_MAX


@triton.jit
def quantize_tile(x, scale):
    """x / scale in e4m3, as `liveavatar_kernels.e4m3.to_e4m3`; `scale` broadcasts."""
    scaled = x * tl.math.div_rn(1.0, scale)
    return tl.minimum(tl.maximum(scaled, -_MAX), _MAX).to(tl.float8e4nv)
