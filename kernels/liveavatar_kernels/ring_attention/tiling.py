"""How ring attention is cut into tiles, and the tiles of the last wave into parts."""

from __future__ import annotations

from dataclasses import dataclass

from ..e4m3 import KV_TILE

_LEAST_TILES = 8
"""Key tiles that a part of a split tile must have, or combining costs more than it saves."""


@dataclass(frozen=True)
class Tiling:
    """How the kernel is launched: queries and keys of a tile, warps, pipeline stages, whether tiles come by TMA."""

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False

    @property
    def tail(self) -> int:
        """Keys of a tile where they may not fill one: few, as masks take registers."""
        return max(16, self.keys // 2)

    @classmethod
    def of(cls, capability: int, head_dim: int, itemsize: int) -> Tiling:
        """For sm_`capability` (0: the interpreter) and elements of `itemsize` bytes; those of e4m3 caches are 1."""
        if capability == 0:
            return cls(32, KV_TILE if itemsize == 1 else 64, 4, 1)
        if itemsize == 4:
            return cls(32, 32, 4, 2)
        roomy = capability // 10 in (9, 10)
        if itemsize == 1:
            return cls(128, KV_TILE, 8, 3, tma=True) if roomy else cls(64, KV_TILE, 8, 2)
        if roomy:
            return cls(128, 128, 8, 2, tma=True)
        return cls(64, 64, 4, 2) if head_dim == 128 else cls(128, 64, 4, 3)


@dataclass(frozen=True)
class Split:
    """`whole` tiles are computed in one go, the `rest` in `parts` each."""

    whole: int
    rest: int
    parts: int

    @classmethod
    def of(cls, tiles: int, processors: int, key_tiles: int) -> Split:
        """Split what is left after the last full wave, if the processors that would idle can take parts of it."""
        rest = tiles % processors
        parts = min(processors // rest, key_tiles // _LEAST_TILES) if rest else 1
        return cls(tiles - rest, rest, parts) if parts > 1 else cls(tiles, 0, 1)

    @property
    def programs(self) -> int:
        return self.whole + self.rest * self.parts
