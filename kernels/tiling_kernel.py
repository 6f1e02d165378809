# mypy: allow-untyped-defs, allow-incomplete-defs
"""Positions in the sequence of the tokens of a tile, for Triton kernels.

``grid`` has the sides g0, g1, g2 (a group such as `Tokens`) and ``BOX`` is the shape of a tile. A tuple or text among
compile-time parameters S is bound to a name, ``BOX: tl.constexpr = S.QB``, before it is passed on: Triton 3.6 passes on
attributes that are numbers only.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["grid_size", "load_box", "tile_corner", "tile_count", "tile_places", "tile_size", "tile_tokens"]


@triton.jit
def tile_count(grid, BOX: tl.constexpr):
    """Number of tiles of a grid."""
    return tl.cdiv(grid.g0, BOX[0]) * tl.cdiv(grid.g1, BOX[1]) * tl.cdiv(grid.g2, BOX[2])


@triton.jit
def grid_size(grid):
    """Number of tokens of a grid."""
    return grid.g0 * grid.g1 * grid.g2


@triton.jit
def tile_corner(tile, grid, BOX: tl.constexpr):
    """Position along each axis of the first token of a tile."""
    n1 = tl.cdiv(grid.g1, BOX[1])
    n2 = tl.cdiv(grid.g2, BOX[2])
    return tile // (n1 * n2) * BOX[0], tile // n2 % n1 * BOX[1], tile % n2 * BOX[2]


@triton.jit
def tile_places(tile, lane, grid, BOX: tl.constexpr):
    """Position along each axis of each lane of a tile, and whether it is valid: lanes past the tile or the grid's edge
    are not. ``lane`` may be a block of any shape."""
    x0, x1, x2 = tile_corner(tile, grid, BOX)
    x0 += lane // (BOX[1] * BOX[2])
    x1 += lane // BOX[2] % BOX[1]
    x2 += lane % BOX[2]
    valid = (lane < BOX[0] * BOX[1] * BOX[2]) & (x0 < grid.g0) & (x1 < grid.g1) & (x2 < grid.g2)
    return x0, x1, x2, valid


@triton.jit
def tile_tokens(tile, lane, grid, BOX: tl.constexpr):
    """Raster index on the grid of each lane of a tile, and whether it is valid (if not, the index is 0)."""
    x0, x1, x2, valid = tile_places(tile, lane, grid, BOX)
    return tl.where(valid, (x0 * grid.g1 + x1) * grid.g2 + x2, 0), valid


@triton.jit
def tile_size(tile, grid, BOX: tl.constexpr):
    """Number of tokens of a tile: fewer at the grid's far edges."""
    x0, x1, x2 = tile_corner(tile, grid, BOX)
    sides = tl.minimum(grid.g0 - x0, BOX[0]) * tl.minimum(grid.g1 - x1, BOX[1])
    return sides * tl.minimum(grid.g2 - x2, BOX[2])


@triton.jit
def load_box(
    boxes, i_b, i_h, n_heads, tile, part, grid, BOX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BOXES: tl.constexpr,
):  # fmt: skip
    """Load a tile, or a part of one, (BLOCK_N, BLOCK_D), through a descriptor of ``launch.box_descriptors``; zeros off
    the grid."""
    x0, x1, x2 = tile_corner(tile, grid, BOX)
    if BLOCK_N < BOX[0] * BOX[1] * BOX[2]:  # noqa: SIM300
        lane = part * BLOCK_N
        x0 += lane // (BOX[1] * BOX[2])
        x1 += lane // BOX[2] % BOX[1]
        x2 += lane % BOX[2]
    if BOXES == "one axis":
        return boxes.load([i_b * n_heads + i_h, x0, x1, x2, 0]).reshape(BLOCK_N, BLOCK_D)
    return boxes.load([i_b, i_h, x1, x2, 0]).reshape(BLOCK_N, BLOCK_D)
