"""Tiling of a grid of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Tiling"]


@dataclass(frozen=True)
class Tiling:
    """Grid of three axes (leading ones have length 1) cut into tiles of shape ``box``; tiles at the far edges may be
    short.

    Blocks of consecutive tokens are the tiles of a grid (1, 1, N). Tiles are numbered in raster order.
    """

    grid: tuple[int, int, int]
    box: tuple[int, int, int]

    @staticmethod
    def of(grid: Sequence[int], box: Sequence[int]) -> Tiling:
        """Tiling of a grid with one to three axes."""
        lead = (1,) * (3 - len(grid))
        return Tiling((*lead, *grid), (*lead, *box))  # type: ignore[arg-type]

    @cached_property
    def counts(self) -> tuple[int, int, int]:
        """Number of tiles along each axis."""
        return tuple(-(-n // side) for n, side in zip(self.grid, self.box, strict=True))  # type: ignore[return-value]

    @cached_property
    def n_tiles(self) -> int:
        return math.prod(self.counts)

    @cached_property
    def n_tokens(self) -> int:
        return math.prod(self.grid)

    @cached_property
    def volume(self) -> int:
        """Tokens of a full tile."""
        return math.prod(self.box)

    @cached_property
    def is_whole(self) -> bool:
        """Whether no tile is short."""
        return all(n % side == 0 for n, side in zip(self.grid, self.box, strict=True))
