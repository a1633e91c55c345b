"""Kernels of the Live Avatar engine, one folder per op. Never imports the engine."""

from .dispatch import KernelUnavailableError

__all__ = ["KernelUnavailableError"]
