"""Drags in what no script needs, as the reference's package does."""

from .wan.wrapper import Wrapper  # noqa: F401
