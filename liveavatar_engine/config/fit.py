"""The sides of a video of a requested area, for a picture of any aspect ratio."""

from __future__ import annotations

import math

from ..errors import InputError

FITTED_MULTIPLE = 64
"""Both sides of a fitted video, in pixels, are multiples of this."""
TYPICAL_SIDES = (720, 1280)
"""Height and width of the picture that an area is taken for where none is at hand yet: 16:9."""

_SCALES_TRIED = 100


def fit_to_area(height: int, width: int, area: int) -> tuple[int, int]:
    """The video's (height, width) for a picture of this size and a requested area ("720*400" asks for 288000 pixels).

    Keeps the aspect ratio as well as sides that are multiples of 64 allow; never exceeds `area`. This is the
    reference's search: from the largest scale at which the picture itself would fit, go down in hundredths of the
    range until it still fits with both sides rounded up.

    Raises:
        InputError: no such size exists, because the area is too small or the picture far too elongated.
    """
    fitted = _largest_fit(height, width, area) or _nearest_fit(height, width, area)
    if min(fitted) <= 0:
        raise InputError(
            f"no video of {area} pixels, sides multiples of {FITTED_MULTIPLE}, fits a {width}x{height} image: the size "
            "asked for is too small, or the image's aspect ratio is too extreme"
        )
    return fitted


def _largest_fit(height: int, width: int, area: int) -> tuple[int, int] | None:
    smallest, largest = _scales(height, width, area)
    for step in range(_SCALES_TRIED):
        scale = largest - (largest - smallest) * step / _SCALES_TRIED
        fitted = _round_up(int(height * scale)), _round_up(int(width * scale))
        if fitted[0] * fitted[1] <= area:
            return fitted
    return None


def _scales(height: int, width: int, area: int) -> tuple[float, float]:
    """The smallest and largest scale worth trying; the former comes from the reference's (inexact) quadratic."""
    pixels = height * width
    if pixels <= area:
        return 0.1, 1.0
    padding = FITTED_MULTIPLE - 1
    linear = padding * (height + width)
    root = math.sqrt(max(0, linear**2 - 2 * pixels * (padding**2 - area)))
    return (root - linear) / (2 * pixels), math.sqrt(area / pixels)


def _nearest_fit(height: int, width: int, area: int) -> tuple[int, int]:
    aspect = width / height
    fitted = _round_down((area / aspect) ** 0.5), _round_down((area * aspect) ** 0.5)
    if fitted[0] >= height or fitted[1] >= width:
        return _round_down(height), _round_down(width)
    return fitted


def _round_up(side: int) -> int:
    return -(-side // FITTED_MULTIPLE) * FITTED_MULTIPLE


def _round_down(side: float) -> int:
    return int(side // FITTED_MULTIPLE) * FITTED_MULTIPLE
