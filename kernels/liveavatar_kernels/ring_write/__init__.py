"""Normalise and rotate a block's queries and keys, and store its keys and values in their ring slots."""

from .reference import ring_write

__all__ = ["ring_write"]
