"""Repairs of Triton's CPU interpreter (3.6 to 3.9), for tests only.

As it comes, bf16 arithmetic works on raw bits, casts to bf16 truncate, casts to e4m3 are wrong for some values, and
NumPy 2.4 refuses the interpreter's one-element arrays as loop bounds. Import with TRITON_INTERPRET=1 set, before the
first launch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_DTYPES = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_BITS = {
    8: (np.uint8, torch.uint8),
    16: (np.uint16, torch.uint16),
    32: (np.uint32, torch.uint32),
    64: (np.uint64, torch.uint64),
}
_EMULATED = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
"""Types that the interpreter keeps as raw bits."""
_E4M3_MAX = 448.0

_convert = interpreter._convert_float
_binary, _unary = interpreter.InterpreterBuilder.binary_op, interpreter.InterpreterBuilder.unary_op
_patch_tensor = interpreter._patch_lang_tensor


def _values(data: Any, dtype: Any) -> torch.Tensor:
    raw = np.ascontiguousarray(np.asarray(data)).view(_BITS[dtype.primitive_bitwidth][0]).reshape(np.shape(data))
    return torch.from_numpy(raw.copy()).view(_DTYPES[dtype])


def _wide(handle: Any) -> np.ndarray:
    dtype = handle.dtype.scalar
    return _values(handle.data, dtype).float().numpy() if dtype in _EMULATED else handle.data


def _convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    """Round to nearest even; e4m3 saturates, as the hardware's conversion does."""
    if source not in _DTYPES or target not in _DTYPES:
        return _convert(data, source, target, rounding_mode)
    x = _values(data, source)
    if target is tl.float8e4nv:
        x = x.float()
        x = torch.where(x.isnan(), x, x.clamp(-_E4M3_MAX, _E4M3_MAX))
    x = x.float() if source.primitive_bitwidth < 32 else x
    return x.to(_DTYPES[target]).view(_BITS[target.primitive_bitwidth][1]).numpy().reshape(np.shape(data))


def _to_bfloat16(values: Any) -> Any:
    bits = _convert_float(np.asarray(values, dtype=np.float32), tl.float32, tl.bfloat16, None)
    return interpreter.TensorHandle(bits, tl.bfloat16)


def _dot(self: Any, a: Any, b: Any, accumulator: Any, *_: Any) -> Any:
    product = np.matmul(_wide(a), _wide(b), dtype=accumulator.data.dtype)
    return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def _binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
    if left.dtype.scalar is not tl.bfloat16 or right.dtype.scalar is not tl.bfloat16:
        return _binary(self, left, right, op)
    out = op(_wide(left), _wide(right))
    return interpreter.TensorHandle(out, tl.bfloat16) if out.dtype == np.bool_ else _to_bfloat16(out)


def _unary_op(self: Any, argument: Any, op: Any) -> Any:
    return _to_bfloat16(op(_wide(argument))) if argument.dtype.scalar is tl.bfloat16 else _unary(self, argument, op)


def _patch_lang_tensor(tensor: Any, scope: Any = None) -> Any:
    patched = _patch_tensor(tensor, scope) if scope is not None else _patch_tensor(tensor)

    def index(self: Any) -> int:
        return int(np.asarray(self.handle.data).reshape(-1)[0])

    if scope is not None:
        scope.set_attr(tensor, "__index__", index)
    else:
        tensor.__index__ = index
    return patched


interpreter._convert_float = _convert_float
interpreter._patch_lang_tensor = _patch_lang_tensor
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.binary_op = _binary_op
interpreter.InterpreterBuilder.unary_op = _unary_op
