"""Checks of tensors that ops write into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_buffer(name: str, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Check that a result of some shape can be written into `buffer`.

    Raises:
        ValueError: it has another shape, dtype or device, or its elements do not lie together in order.
    """
    if buffer.shape != torch.Size(shape) or buffer.dtype != dtype or buffer.device != device:
        found = f"{buffer.dtype} {list(buffer.shape)} on {buffer.device}"
        raise ValueError(f"{name}: expected {dtype} {list(shape)} on {device}, not {found}")
    if not buffer.is_contiguous():
        raise ValueError(f"{name}: expected to be contiguous, {list(shape)} has strides {buffer.stride()}")


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether contiguous tensors, which are not fake, share memory."""
    return (
        one.device == other.device
        and one.data_ptr() < other.data_ptr() + other.nbytes
        and other.data_ptr() < one.data_ptr() + one.nbytes
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Whether contiguous tensors, which are not fake, are the same memory from end to end."""
    return one.device == other.device and one.data_ptr() == other.data_ptr() and one.nbytes == other.nbytes
