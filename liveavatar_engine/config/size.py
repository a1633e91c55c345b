"""A requested picture size: an area that keeps the image's aspect ratio, or exact sides."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ConfigError
from .fit import fit_to_area

SIDE_MULTIPLE = 16
"""Eight pixels a latent, two latents a patch."""
MIN_SIDE = 64
"""The oldest motion latents are packed in patches of 8 x 8 latents: 64 pixels."""
MAX_SIDE = 4096


@dataclass(frozen=True)
class Size:
    """`WxH` is exact, `W*H` an area. Both sides in pixels."""

    width: int
    height: int
    exact: bool

    @property
    def area(self) -> int:
        return self.width * self.height

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read "704*384" or "704x384".

        Raises:
            ConfigError: another notation, a side outside 64..4096, or an exact side that is no multiple of 16.
        """
        match = re.fullmatch(r"\s*(\d{1,9})\s*([*x])\s*(\d{1,9})\s*", str(text))
        if match is None:
            raise ConfigError(
                f"size {text!r}: expected W*H (an area, e.g. 704*384) or WxH (exact sides, e.g. 704x384), in pixels"
            )
        width, height, exact = int(match[1]), int(match[3]), match[2] == "x"
        for side in (width, height):
            if not MIN_SIDE <= side <= MAX_SIDE:
                raise ConfigError(f"size {text!r}: sides must be {MIN_SIDE} to {MAX_SIDE} pixels, not {side}")
            if exact and side % SIDE_MULTIPLE:
                raise ConfigError(f"size {text!r}: exact sides must be multiples of {SIDE_MULTIPLE}, {side} is not")
        return cls(width, height, exact)

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the video of a picture with these sides.

        Raises:
            InputError: an area that no video of the picture's aspect ratio fits.
        """
        return (self.height, self.width) if self.exact else fit_to_area(height, width, self.area)
