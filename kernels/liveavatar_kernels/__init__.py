"""Kernels of the Live Avatar engine, one folder per op. Never imports the engine."""

from .catalog import Entry, catalog
from .dispatch import KernelUnavailableError

__all__ = ["Entry", "KernelUnavailableError", "catalog"]
