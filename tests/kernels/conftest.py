"""Triton kernels run in the interpreter here, repaired where it is wrong."""

import interpreter  # noqa: F401
