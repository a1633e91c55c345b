"""What a kernel needs to be compiled ahead of time, without a GPU: `make aot` and `catalog` read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

E4M3_CAPABILITY = 89
"""The oldest GPU whose Triton has e4m3."""


@dataclass(frozen=True)
class KernelSpec:
    """A kernel as it is launched at the model's sizes.

    Attributes:
        name: op, kernel and variant.
        function: the Triton function.
        signature: type of every argument that is not a constexpr, in Triton's names.
        constexprs: values of the others.
        options: of the compiler, such as num_warps and num_stages.
        divisible_by_16: arguments whose value, or address, is a multiple of 16.
        matrix: whether matrix instructions are expected in what the compiler makes of it.
        gluon: whether the function is written in Gluon, which is compiled from GluonASTSource.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, int]
    divisible_by_16: tuple[str, ...]
    matrix: bool = False
    gluon: bool = False


def kernel_spec(
    name: str,
    function: Any,
    pointer: str,
    constexprs: Mapping[str, Any],
    options: Mapping[str, int],
    types: Mapping[str, str] | None = None,
    matrix: bool = False,
) -> KernelSpec:
    """A spec by the kernels' naming rules, with `types` for what departs from them.

    An argument called *_ptr points to `pointer`s; *_slot_stride is a 64-bit count of elements, other counts are 32 bits
    wide, eps and scale are float32. Pointers and strides are multiples of 16.
    """
    signature = {}
    for argument in function.arg_names:
        if argument in constexprs:
            continue
        if types is not None and argument in types:
            signature[argument] = types[argument]
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{pointer}"
        elif argument.endswith("_slot_stride"):
            signature[argument] = "i64"
        else:
            signature[argument] = "fp32" if argument in ("eps", "scale") else "i32"
    aligned = tuple(name for name in signature if name.endswith(("_ptr", "_stride")))
    return KernelSpec(name, function, signature, dict(constexprs), dict(options), aligned, matrix)
