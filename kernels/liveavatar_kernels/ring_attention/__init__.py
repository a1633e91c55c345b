"""Attention of a block's queries over the ring buffer of its timestep and the shared sink buffer."""

from .reference import ring_attention

__all__ = ["ring_attention"]
