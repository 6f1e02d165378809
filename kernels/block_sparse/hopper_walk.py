# mypy: allow-untyped-defs, allow-incomplete-defs
"""Order of the tiles and keys in the Hopper kernel, shared by its producer warp and its consumer groups."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .arguments import FullTiles, State

__all__ = [
    "Linear",
    "Output",
    "Schedule",
    "Sizes",
    "Static",
    "corner",
    "counts",
    "first_global_row",
    "item_of",
    "key_intervals",
    "list_of",
    "listed",
    "serpentine_step",
    "tile_of",
]


class Schedule(NamedTuple):
    """Items of each program in order, (turns, programs), and its number of turns, (programs,)."""

    order: Any
    turns: Any


class Sizes(NamedTuple):
    """Tiles of global queries, those of them before the grid, and pooled keys. Not specialized: they change with the
    length of the text."""

    n_global_tiles: int
    n_global_before: int
    n_pooled: int


class Output(NamedTuple):
    """(H, S, D) output with its strides, and (H, S) log-sum-exp or None."""

    out: Any
    head: int
    row: int
    lse: Any


class Linear(NamedTuple):
    """Norm, eps and bias of the linear branch; see ``forward.LinearBranch``."""

    norm: Any
    eps: Any
    bias: Any


class Static(NamedTuple):
    """Compile-time parameters.

    D: head dim. N: keys per step. SLOTS: steps in shared memory. QB, KB: tile shapes of queries and keys. FLAT: the
    grid has one axis. SHORT: axes along which the last key tile is short. FULL, STATE as in ``arguments.Static``; IN,
    BALL as in ``windows/visible_kernel.py``; ROUND: the ball's weights are 1.
    """

    D: int
    N: int
    SLOTS: int
    QB: tuple[int, int, int]
    KB: tuple[int, int, int]
    FLAT: bool
    SHORT: tuple[bool, bool, bool]
    FULL: FullTiles
    HAS_PARTIAL: bool
    HAS_GLOBAL: bool
    HAS_POOLED: bool
    STATE: State
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
def listed(p_list, place, n_tiles):
    """Tile at a position of a list; the last tile past the end of the list, and tile 0 for an empty list."""
    return gl.load(p_list + gl.minimum(place, n_tiles - 1), mask=n_tiles > 0, other=0)


@gluon.jit
def serpentine_step(i, n_steps, turn):
    """Index of the i-th step of a list. Every second turn walks its list backwards: programs run roughly in lockstep,
    so the tiles that the previous turn read last are still in the L2 cache."""
    return gl.where(turn % 2 == 0, i, n_steps - 1 - i)


@gluon.jit
def item_of(schedule, turn, turns):
    """Tile of a turn."""
    return gl.load(schedule.order + gl.minimum(turn, turns - 1) * gl.num_programs(0) + gl.program_id(0))


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
def list_of(lists, item, n_global_tiles, n_heads, n_q_tiles):
    """Pointer to the list of a tile."""
    h, tile, _is_global = tile_of(item, n_global_tiles, n_heads, n_q_tiles)
    return lists.indices + h.to(gl.int64) * lists.stride + tile.to(gl.int64) * lists.longest


@gluon.jit
def counts(lists, item, n_global_tiles, n_heads, n_q_tiles, S: gl.constexpr):
    """Number of key tiles listed for a tile, and of those that need no mask."""
    h, tile, is_global = tile_of(item, n_global_tiles, n_heads, n_q_tiles)
    g = gl.where(lists.stride > 0, h, 0) * n_q_tiles + tile
    n_tiles = gl.load(lists.counts + g, mask=is_global == 0, other=0)
    n_full = n_tiles
    if S.FULL == "none":
        n_full = n_tiles * 0
    elif S.FULL == "counted":
        n_full = gl.load(lists.full_counts + g, mask=is_global == 0, other=0)
    elif S.FULL == "all but the last":  # all but the very last tile of the grid, which can only be the last entry
        n_full = gl.maximum(n_tiles - 1, 0)
    return n_tiles, n_full


@gluon.jit
def first_global_row(tile, n_global_before, queries):
    """First row of a tile of global queries."""
    n_grid = queries.g0 * queries.g1 * queries.g2
    row = gl.where(tile < n_global_before, tile, tile - n_global_before) * 128
    return gl.where(tile < n_global_before, row, row + queries.before + n_grid)


@gluon.jit
def key_intervals(is_global, keys, n_pooled, N: gl.constexpr):
    """Intervals of consecutive keys: lengths of the one before the grid (the whole sequence, for global queries), the
    one after it, and the pooled tokens; then the cumulative number of steps through them."""
    n_grid = keys.g0 * keys.g1 * keys.g2
    end0 = gl.where(is_global, keys.length, keys.before)
    end1 = gl.where(is_global, 0, keys.length - keys.before - n_grid)
    end2 = gl.where(is_global, 0, n_pooled)
    n0 = (end0 + N - 1) // N
    n1 = n0 + (end1 + N - 1) // N
    return end0, end1, end2, n0, n1, n1 + (end2 + N - 1) // N
