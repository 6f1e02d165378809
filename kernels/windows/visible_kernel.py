# mypy: allow-untyped-defs, allow-incomplete-defs
"""Visibility of keys to queries, for Triton kernels: the `WindowMask` of ``block_sparse/plan.py``, by positions.

``window`` is a group of :class:`Window`. Of the compile-time parameters S these functions read IN (axes with
intervals), BALL (axes of the ball), COST, and ORDERED (axes whose positions are not coordinates, because of dilation).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..tiling_kernel import tile_places

__all__ = ["Window", "query_intervals", "tile_rows", "visible"]


class Window(NamedTuple):
    """Tables (3, 3, longest) of each axis: the coordinate of each position, and the first and last position visible to
    its query; weights of the axes and limit of the ball, and the same four in float64, in memory."""

    tables: Any
    longest: int
    ball: Any
    w0: float
    w1: float
    w2: float
    limit: float


@triton.jit
def tile_rows(tile, lane, tokens, window, BOX: tl.constexpr, S: tl.constexpr):
    """Position along each axis of each lane of a tile, whether it is valid, and its row in the sequence; with dilation
    a table maps positions to coordinates."""
    x0, x1, x2, valid = tile_places(tile, lane, tokens, BOX)
    y0, y1, y2 = x0, x1, x2
    if S.ORDERED[0]:
        y0 = tl.load(window.tables + x0, mask=valid, other=0)
    if S.ORDERED[1]:
        y1 = tl.load(window.tables + 3 * window.longest + x1, mask=valid, other=0)
    if S.ORDERED[2]:
        y2 = tl.load(window.tables + 6 * window.longest + x2, mask=valid, other=0)
    row = tl.where(valid, (y0 * tokens.g1 + y1) * tokens.g2 + y2, 0)
    return (x0, x1, x2), valid, tokens.before + row


@triton.jit
def _interval(window, AXIS: tl.constexpr, place, length):
    """Centre and half length of the interval of positions visible to queries along an axis (halves are exact)."""
    p_first = window.tables + (3 * AXIS + 1) * window.longest + place
    first = tl.load(p_first, mask=place < length, other=0).to(tl.float32)
    last = tl.load(p_first + window.longest, mask=place < length, other=0).to(tl.float32)
    return (first + last) * 0.5, (last - first) * 0.5


@triton.jit
def query_intervals(window, q, grid, S: tl.constexpr):
    """Centre and half length of the interval of each query at positions q, for each axis with intervals."""
    interval0, interval1, interval2 = (q[0], q[0]), (q[1], q[1]), (q[2], q[2])
    if S.IN[0]:
        interval0 = _interval(window, 0, q[0], grid.g0)
    if S.IN[1]:
        interval1 = _interval(window, 1, q[1], grid.g1)
    if S.IN[2]:
        interval2 = _interval(window, 2, q[2], grid.g2)
    return interval0, interval1, interval2


@triton.jit
def visible(own, other, valid, intervals, origin, window, KEYS_FIRST: tl.constexpr, S: tl.constexpr):
    """Whether queries and keys see one another: (own, other), of the tile that a program holds and the tile of a step.

    own, other: positions along each axis; KEYS_FIRST: own are the keys. valid: of other. intervals: of the queries.
    origin: position of the first token of the own tile; distances are taken between small integers relative to it.
    """
    m_visible = valid[None, :]
    if KEYS_FIRST:  # noqa: SIM108
        keys = own
    else:
        keys = other
    if S.IN[0]:
        m_visible = m_visible & _in_interval(keys[0], intervals[0], KEYS_FIRST)
    if S.IN[1]:
        m_visible = m_visible & _in_interval(keys[1], intervals[1], KEYS_FIRST)
    if S.IN[2]:
        m_visible = m_visible & _in_interval(keys[2], intervals[2], KEYS_FIRST)
    if S.BALL[0] or S.BALL[1] or S.BALL[2]:
        # a type that represents these integers and their squares
        TYPE: tl.constexpr = tl.float64 if S.COST == "float64" else tl.float32
        x = ((other[0] - origin[0]).to(TYPE), (other[1] - origin[1]).to(TYPE), (other[2] - origin[2]).to(TYPE))
        y = ((own[0] - origin[0]).to(TYPE), (own[1] - origin[1]).to(TYPE), (own[2] - origin[2]).to(TYPE))
        m_visible = m_visible & _in_ball(x, y, window, S)
    return m_visible


@triton.jit
def _in_interval(k, interval, KEYS_FIRST: tl.constexpr):
    """Whether the position of a key lies in the interval of a query: (queries, keys), transposed with KEYS_FIRST."""
    middle, half = interval
    k = k.to(tl.float32)
    if KEYS_FIRST:
        return tl.abs(k[:, None] - middle[None, :]) <= half[None, :]
    else:
        return tl.abs(k[None, :] - middle[:, None]) <= half[:, None]


@triton.jit
def _in_ball(x, y, window, S: tl.constexpr):
    """Whether w·(x - y)² < limit, for tokens at x (m,) and at y (n,): (n, m).

    COST "expanded": the weights are 1; the square is expanded to x² - 2 x y < limit - y², two operations per axis and
    exact in float32. "float32" and "float64": without expansion; in float64 with weights from memory, because scalars
    are float32.
    """
    if S.COST == "expanded":
        near = x[1] * 0.0
        left = window.limit - y[1] * 0.0
        for axis in tl.static_range(3):
            if S.BALL[axis]:
                near += x[axis] * x[axis]
                left -= y[axis] * y[axis]
        cost = near[None, :]
        for axis in tl.static_range(3):
            if S.BALL[axis]:
                cost = x[axis][None, :] * (-2 * y[axis])[:, None] + cost
        return cost < left[:, None]
    else:
        cost = (x[1] * 0.0)[None, :]
        for axis in tl.static_range(3):
            if S.BALL[axis]:
                gap = x[axis][None, :] - y[axis][:, None]
                cost = cost + gap * gap * _ball_weight(window, axis, S)
        if S.COST == "float64":
            return cost < tl.load(window.ball + 3)
        else:
            return cost < window.limit


@triton.jit
def _ball_weight(window, AXIS: tl.constexpr, S: tl.constexpr):
    if S.COST == "float64":
        return tl.load(window.ball + AXIS)
    elif AXIS == 0:
        return window.w0
    elif AXIS == 1:
        return window.w1
    else:
        return window.w2
