"""The environment variables that the project reads, all of them, typed and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

KERNEL_FAMILIES = ("reference", "triton", "cuda")


@dataclass(frozen=True)
class Environment:
    """Settings from the environment.

    Attributes:
        kernels: `LIVEAVATAR_KERNELS`, the implementation that ops prefer where they have it; None: each op's own order.
        world_size: `WORLD_SIZE`, processes of the job that torchrun has started this one in; None: it has not.
    """

    kernels: str | None = None
    world_size: int | None = None

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> Environment:
        """Read `variables`.

        Raises:
            ValueError: a variable has a value that it cannot have.
        """
        kernels = variables.get("LIVEAVATAR_KERNELS") or None
        if kernels is not None and kernels not in KERNEL_FAMILIES:
            raise ValueError(f"LIVEAVATAR_KERNELS must be one of {', '.join(KERNEL_FAMILIES)}, not {kernels!r}")
        world_size = variables.get("WORLD_SIZE") or None
        if world_size is not None and not (world_size.isdecimal() and int(world_size)):
            raise ValueError(f"WORLD_SIZE must be a number of processes, not {world_size!r}")
        return cls(kernels, None if world_size is None else int(world_size))
