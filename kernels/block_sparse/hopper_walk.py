# mypy: allow-untyped-defs, allow-incomplete-defs
"""Order of the tiles and keys in the Hopper kernel, shared by its producer warp and its consumer groups."""

from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = [
    "Static",
    "corner",
    "counts",
    "global_row",
    "item_of",
    "key_intervals",
    "list_of",
    "listed",
    "serpentine_step",
    "tile_of",
]


@dataclass(frozen=True)
class Static:
    """Compile-time parameters: tile shapes of queries and keys, whether the grid has one axis, axes along which the
    last key tile is short; FULL, IN, BALL, STATE_MODE as in ``block_sparse_triton.py``; ROUND: the ball's weights are
    1."""

    QB: tuple[int, int, int]
    KB: tuple[int, int, int]
    FLAT: bool
    SHORT: tuple[bool, bool, bool]
    FULL: int
    HAS_PARTIAL: bool
    HAS_GLOBAL: bool
    HAS_POOLED: bool
    STATE_MODE: int
    HAS_BIAS: bool
    HAS_LSE: bool
    FEATURE_MAP: str
    IN: tuple[bool, bool, bool]
    BALL: tuple[bool, bool, bool]
    ROUND: bool


@gluon.jit
def quotient(x, n):
    """x // n of integers below 2**20: (x + 0.5) / n is further from an integer than the error of float32."""
    return ((x.to(gl.float32) + 0.5) * (1.0 / n.to(gl.float32))).to(gl.int32)


@gluon.jit
def corner(tile, n1, n2, FLAT: gl.constexpr, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr):
    """First position of a tile along each axis. FLAT: there is one axis."""
    if FLAT:
        return tile * 0, tile * 0, tile * B2
    rows = quotient(tile, n2)
    x0 = quotient(rows, n1)
    return x0 * B0, (rows - x0 * n1) * B1, (tile - rows * n2) * B2


@gluon.jit
def listed(TILES, place, n_tiles):
    """Tile at a position of a list; the last tile past the end of the list, and tile 0 for an empty list."""
    return gl.load(TILES + gl.minimum(place, n_tiles - 1), mask=n_tiles > 0, other=0)


@gluon.jit
def serpentine_step(i, n_steps, turn):
    """Index of the i-th step of a list. Every second turn walks its list backwards: programs run roughly in lockstep,
    so the tiles that the previous turn read last are still in the L2 cache."""
    return gl.where(turn % 2 == 0, i, n_steps - 1 - i)


@gluon.jit
def item_of(ORDER, turn, turns):
    """Tile of a turn."""
    return gl.load(ORDER + gl.minimum(turn, turns - 1) * gl.num_programs(0) + gl.program_id(0))


@gluon.jit
def tile_of(item, n_global_tiles, n_heads, n_q_tiles):
    """Head, index within the head, and whether the tile has global queries."""
    n_global_items = n_global_tiles * n_heads
    is_global = item < n_global_items
    local = gl.where(is_global, item, item - n_global_items)
    per_head = gl.where(is_global, n_global_tiles, n_q_tiles)
    h = local // per_head
    return h, local - h * per_head, is_global


@gluon.jit
def list_of(TILES, item, n_global_tiles, n_heads, n_q_tiles, list_stride, n_list):
    """Start of the list of a tile."""
    h, tile, _is_global = tile_of(item, n_global_tiles, n_heads, n_q_tiles)
    return TILES + h.to(gl.int64) * list_stride + tile.to(gl.int64) * n_list


@gluon.jit
def counts(N_FULL, N_TILES, item, n_global_tiles, n_heads, list_stride, n_q_tiles, S: gl.constexpr):
    """Number of key tiles listed for a tile, and of those that need no mask."""
    h, tile, is_global = tile_of(item, n_global_tiles, n_heads, n_q_tiles)
    g = gl.where(list_stride > 0, h, 0) * n_q_tiles + tile
    n_tiles = gl.load(N_TILES + g, mask=is_global == 0, other=0)
    n_full = n_tiles
    if S.FULL == 0:
        n_full = n_tiles * 0
    elif S.FULL == 1:
        n_full = gl.load(N_FULL + g, mask=is_global == 0, other=0)
    elif S.FULL == 3:  # all but the very last tile of the grid, which can only be the last entry
        n_full = gl.maximum(n_tiles - 1, 0)
    return n_tiles, n_full


@gluon.jit
def global_row(tile, n_global_before, q_before, n_grid_q):
    """First row of a tile of global queries."""
    row = gl.where(tile < n_global_before, tile, tile - n_global_before) * 128
    return gl.where(tile < n_global_before, row, row + q_before + n_grid_q)


@gluon.jit
def key_intervals(is_global, length_k, k_before, n_grid_k, n_pooled, N: gl.constexpr):
    """Intervals of consecutive keys: lengths of the one before the grid (the whole sequence, for global queries), the
    one after it, and the pooled tokens; then the cumulative number of steps through them."""
    end0 = gl.where(is_global, length_k, k_before)
    end1 = gl.where(is_global, 0, length_k - k_before - n_grid_k)
    end2 = gl.where(is_global, 0, n_pooled)
    n0 = (end0 + N - 1) // N
    n1 = n0 + (end1 + N - 1) // N
    return end0, end1, end2, n0, n1, n1 + (end2 + N - 1) // N
