"""The environment variables that the project reads, all of them, typed and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

KERNEL_FAMILIES = ("reference", "triton", "cuda")


@dataclass(frozen=True)
class Torchrun:
    """What torchrun tells each process of a job.

    Attributes:
        rank: `RANK`.
        world_size: `WORLD_SIZE`.
        local_world_size: `LOCAL_WORLD_SIZE`, processes of this node.
        master: `MASTER_ADDR` and `MASTER_PORT`, where the job's store is.
    """

    rank: int
    world_size: int
    local_world_size: int
    master: tuple[str, int]


@dataclass(frozen=True)
class Environment:
    """Settings from the environment.

    Attributes:
        kernels: `LIVEAVATAR_KERNELS`, the implementation that ops prefer where they have it; None: each op's own order.
        torchrun: the job that this process is part of, if torchrun has started it.
    """

    kernels: str | None = None
    torchrun: Torchrun | None = None

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> Environment:
        """Read `variables`.

        Raises:
            ValueError: a variable has a value that it cannot have.
        """
        kernels = variables.get("LIVEAVATAR_KERNELS") or None
        if kernels is not None and kernels not in KERNEL_FAMILIES:
            raise ValueError(f"LIVEAVATAR_KERNELS must be one of {', '.join(KERNEL_FAMILIES)}, not {kernels!r}")
        return cls(kernels, _torchrun(variables))


def _torchrun(variables: Mapping[str, str]) -> Torchrun | None:
    if "TORCHELASTIC_RUN_ID" not in variables:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    for name in names:
        if not variables.get(name, "").isdigit():
            raise ValueError(f"{name}: torchrun sets it to a number, not to {variables.get(name)!r}")
    rank, world_size, local_world_size, port = (int(variables[name]) for name in names)
    return Torchrun(rank, world_size, local_world_size, (variables.get("MASTER_ADDR", "127.0.0.1"), port))
