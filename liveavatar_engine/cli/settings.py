"""Settings of an engine as several commands take them."""

from __future__ import annotations

from ..config.engine import REFERENCE_FP8_SKIP

FP8_SKIP_HELP = "parts of names of linear layers to keep out of FP8, or none (default: the reference's list)"


def fp8_skip(text: str | None) -> tuple[str, ...]:
    """The list that an option names; its default where there is none."""
    if text is None:
        return REFERENCE_FP8_SKIP
    return () if text == "none" else tuple(text.split(","))
