"""What carries latents between two devices, and shares of a step between several: NCCL between GPUs, gloo elsewhere.

Backends are made directly over a store, without torch's global process group: a process can have many, and whoever
embeds the engine keeps their own.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ...runtime.group import Backend as GroupBackend
from ...runtime.group import Work

_NO_TIMEOUT = timedelta(days=365)
"""Whether a peer has died or hangs, the front finds out; how long it lets others wait says nothing."""
_CTAS = 2
"""Thread blocks that a transfer may occupy beside a denoise step."""


class Backend(GroupBackend, Protocol):
    """Transfers tensors within a group of ranks."""

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Work: ...

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Work: ...

    def shutdown(self) -> None: ...


def open_store(host: str) -> dist.TCPStore:
    """A store where backends meet; it asks nobody for a key, so it listens at this address of the machine alone."""
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    return dist.TCPStore(host, port, None, True, wait_for_workers=False, master_listen_fd=listening.detach())


def open_backend(
    device: torch.device, store: dist.Store, name: str, rank: int, size: int, host: str, *, beside: bool = True
) -> Backend:
    """A backend for tensors on `device`, shared by `size` processes that name it alike.

    Args:
        device: of the tensors; the kind is the same in all processes.
        store: that all of them reach.
        name: of the group.
        rank: of this process in it.
        size: of the group.
        host: an address of this machine that the others reach.
        beside: whether its transfers go on beside other work, for which they leave most of a GPU.
    """
    store.set_timeout(_NO_TIMEOUT)
    prefixed = dist.PrefixStore(name, store)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options.is_high_priority_stream = True
        options._timeout = _NO_TIMEOUT
        if beside:
            options.config.min_ctas = 1
            options.config.max_ctas = _CTAS
        with torch.cuda.device(device):
            return cast(Backend, dist.ProcessGroupNCCL(prefixed, rank, size, options))
    gloo: Any = vars(dist.ProcessGroupGloo)["_Options"]()
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = _NO_TIMEOUT
    return cast(Backend, dist.ProcessGroupGloo(prefixed, rank, size, gloo))
