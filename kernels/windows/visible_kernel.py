# mypy: allow-untyped-defs, allow-incomplete-defs
"""Visibility of keys to queries, for Triton kernels: the `WindowMask` of ``block_plan.py``, by positions."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ball_weights", "in_ball", "in_interval", "query_interval", "token_at"]


@triton.jit
def token_at(
    TABLES, x0, x1, x2, valid, longest, G1, G2, OR0: tl.constexpr, OR1: tl.constexpr, OR2: tl.constexpr
):  # fmt: skip
    """Raster index of the token at these positions; with dilation a table maps positions to coordinates."""
    if OR0:
        x0 = tl.load(TABLES + x0, mask=valid, other=0)
    if OR1:
        x1 = tl.load(TABLES + 3 * longest + x1, mask=valid, other=0)
    if OR2:
        x2 = tl.load(TABLES + 6 * longest + x2, mask=valid, other=0)
    return tl.where(valid, (x0 * G1 + x1) * G2 + x2, 0)


@triton.jit
def query_interval(TABLES, axis: tl.constexpr, place, length, longest):
    """Centre and half length of the interval of positions visible to queries along an axis (halves are exact)."""
    first = tl.load(TABLES + (3 * axis + 1) * longest + place, mask=place < length, other=0).to(tl.float32)
    last = tl.load(TABLES + (3 * axis + 2) * longest + place, mask=place < length, other=0).to(tl.float32)
    return (first + last) * 0.5, (last - first) * 0.5


@triton.jit
def in_interval(k, middle, half, KEYS_FIRST: tl.constexpr):
    """Whether the position of a key lies in the interval of a query: (queries, keys), transposed with KEYS_FIRST."""
    k = k.to(tl.float32)
    if KEYS_FIRST:
        return tl.abs(k[:, None] - middle[None, :]) <= half[None, :]
    else:
        return tl.abs(k[None, :] - middle[:, None]) <= half[:, None]


@triton.jit
def ball_weights(BALL, w0, w1, w2, limit, COST: tl.constexpr):
    """Weights of the axes and limit of a ball: with COST 2 in float64, from memory, because scalars are float32."""
    if COST == 2:
        return tl.load(BALL), tl.load(BALL + 1), tl.load(BALL + 2), tl.load(BALL + 3)
    else:
        return w0, w1, w2, limit


@triton.jit
def in_ball(
    x0, x1, x2, y0, y1, y2, w0, w1, w2, limit, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, COST: tl.constexpr
):
    """Whether w·(x - y)² < limit, for tokens at x (m,) and at y (n,): (n, m).

    COST 0: the weights are 1; the square is expanded to x² - 2 x y < limit - y², two operations per axis and exact in
    float32. COST 1 in float32 and COST 2 in float64, without expansion.
    """
    if COST == 0:
        near = x1 * 0.0
        left = limit - y1 * 0.0
        if B0:
            near += x0 * x0
            left -= y0 * y0
        if B1:
            near += x1 * x1
            left -= y1 * y1
        if B2:
            near += x2 * x2
            left -= y2 * y2
        cost = near[None, :]
        if B0:
            cost = x0[None, :] * (-2 * y0)[:, None] + cost
        if B1:
            cost = x1[None, :] * (-2 * y1)[:, None] + cost
        if B2:
            cost = x2[None, :] * (-2 * y2)[:, None] + cost
        return cost < left[:, None]
    cost = (x1 * 0.0)[None, :]
    if B0:
        cost = cost + (x0[None, :] - y0[:, None]) * (x0[None, :] - y0[:, None]) * w0
    if B1:
        cost = cost + (x1[None, :] - y1[:, None]) * (x1[None, :] - y1[:, None]) * w1
    if B2:
        cost = cost + (x2[None, :] - y2[:, None]) * (x2[None, :] - y2[:, None]) * w2
    return cost < limit
