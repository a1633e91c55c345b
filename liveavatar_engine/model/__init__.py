"""The network that one denoise step calls; parameter names are those of the reference's checkpoint."""

from .network import Network

__all__ = ["Network"]
