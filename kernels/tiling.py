# mypy: allow-untyped-defs, allow-incomplete-defs
"""A grid of tokens cut into boxes, and where in the sequence the tokens of a box are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl

__all__ = ["Tiling", "tile_places", "tile_tokens"]


@dataclass(frozen=True)
class Tiling:
    """A grid of three axes (leading ones have length 1) in boxes; boxes at the far edges may be short.

    Runs of raster order are the boxes of a grid (1, 1, N). Boxes are numbered in raster order.
    """

    grid: tuple[int, int, int]
    box: tuple[int, int, int]

    @staticmethod
    def of(grid: Sequence[int], box: Sequence[int]) -> Tiling:
        """From one to three axes."""
        lead = (1,) * (3 - len(grid))
        return Tiling((*lead, *grid), (*lead, *box))  # type: ignore[arg-type]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Boxes along each axis."""
        return tuple(-(-n // side) for n, side in zip(self.grid, self.box, strict=True))  # type: ignore[return-value]

    @property
    def n_tiles(self) -> int:
        return math.prod(self.counts)

    @property
    def n_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def volume(self) -> int:
        """Tokens in a whole box."""
        return math.prod(self.box)

    @property
    def is_whole(self) -> bool:
        """No box is short."""
        return all(n % side == 0 for n, side in zip(self.grid, self.box, strict=True))


@triton.jit
def tile_places(tile, lane, G0, G1, G2, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr):
    """Place along each axis of each lane of a box, and whether it is on the grid: lanes past the box or the grid's edge
    are not. ``lane`` may be a block of any shape."""
    n1 = tl.cdiv(G1, B1)
    n2 = tl.cdiv(G2, B2)
    x0 = tile // (n1 * n2) * B0 + lane // (B1 * B2)
    x1 = tile // n2 % n1 * B1 + lane // B2 % B1
    x2 = tile % n2 * B2 + lane % B2
    return x0, x1, x2, (lane < B0 * B1 * B2) & (x0 < G0) & (x1 < G1) & (x2 < G2)


@triton.jit
def tile_tokens(tile, lane, G0, G1, G2, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr):
    """Raster index on the grid of each lane of a box, and whether it is a token (if not its index is 0)."""
    x0, x1, x2, valid = tile_places(tile, lane, G0, G1, G2, B0, B1, B2)
    return tl.where(valid, (x0 * G1 + x1) * G2 + x2, 0), valid
