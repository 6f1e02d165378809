# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernel of ``block_linear_bwd_triton.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiling_triton import tile_tokens
from .forward_kernel import feature

__all__ = ["linear_rows_bwd_kernel"]


@triton.jit
def _feature_backward(x, phi, d_phi, FEATURE_MAP: tl.constexpr):
    """Gradient of x (rows, BLOCK_D), given φ(x) and the gradient of φ(x)."""
    if FEATURE_MAP == "softmax":
        return phi * (d_phi - tl.sum(phi * d_phi, 1)[:, None])
    elif FEATURE_MAP == "elu":
        return d_phi * tl.where(x > 0, 1.0, tl.exp(x))
    else:
        return tl.where(x > 0, d_phi, 0.0)


@triton.jit
def linear_rows_bwd_kernel(
    X, Y, STATE, NORM, EPS, KEY_MASK, DX, PRODUCT, QUOTIENT, D_TOTAL, DELTA,
    sxb, sxh, sxr, syb, syh, syr, sob, soh, sor, smb, sms,
    n_heads, n_tiles, length, before, G0, G1, G2,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    FEATURE_MAP: tl.constexpr, OF_QUERIES: tl.constexpr, BY_TILE: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_M rows of a tile of one head.

    Queries (x = q, y = the gradient before the projection g, STATE = A, NORM = z): u = φ(q) A / t with
    t = φ(q)·z + eps to PRODUCT, g / t to QUOTIENT, -g·u / t to D_TOTAL, g·u to DELTA, and
    φ'(q) (g Aᵀ / t - z g·u / t) to DX.
    Keys (x = k, y = v, STATE = dA, NORM = dz): φ(k) dA to PRODUCT and φ'(k) (v dAᵀ + dz) to DX; 0 for masked keys.
    """
    i_part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS % n_tiles
    bh = (tl.program_id(0) // (PARTS * n_tiles)).to(tl.int64)
    b, h = bh // n_heads, bh % n_heads
    dims = tl.arange(0, BLOCK_D)
    index, inside = tile_tokens(tile, i_part * BLOCK_M + tl.arange(0, BLOCK_M), G0, G1, G2, B0, B1, B2)
    row = (before + index).to(tl.int64)
    valid = inside
    if HAS_KEY_MASK:
        valid = valid & (tl.load(KEY_MASK + b * smb + row * sms, mask=inside, other=0) != 0)
    m_x = valid[:, None] & (dims < D)[None, :]
    p_y = Y + b * syb + h * syh + row[:, None] * syr
    if BLOCK_E == BLOCK_D:  # the load overlaps the computation of φ(x)
        y = tl.load(p_y + dims[None, :], mask=m_x, other=0.0)
    x = tl.load(X + b * sxb + h * sxh + row[:, None] * sxr + dims[None, :], mask=m_x, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    phi = feature(x, FEATURE_MAP, D).to(dtype)
    which = bh
    if BY_TILE:
        which = bh * n_tiles + tile
    STATE += which * D * D
    norm = tl.load(NORM + which * D + dims, mask=dims < D, other=0.0)
    total = tl.full([BLOCK_M], 1.0, tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if OF_QUERIES:
        total = tl.sum(phi.to(tl.float32) * norm[None, :], 1)
        # 0 if φ(q) and all summed φ(k) have disjoint support: every numerator is then 0 as well
        total = tl.where(total == 0, 1.0, total + tl.load(EPS + bh))
    p_out = b * sob + h * soh + row[:, None] * sor
    d_phi = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, BLOCK_D, BLOCK_E):
        cols = start + tl.arange(0, BLOCK_E)
        m_y = valid[:, None] & (cols < D)[None, :]
        m_out = inside[:, None] & (cols < D)[None, :]
        if BLOCK_E < BLOCK_D:
            y = tl.load(p_y + cols[None, :], mask=m_y, other=0.0)
        m_state = (dims < D)[:, None] & (cols < D)[None, :]
        state = tl.load(STATE + dims[:, None] * D + cols[None, :], mask=m_state, other=0.0)
        product = tl.dot(phi.to(state.dtype), state, input_precision=PRECISION)
        if OF_QUERIES:
            product = product / total[:, None]
            delta += tl.sum(product * y.to(tl.float32), 1)
            factor = y.to(tl.float32) / total[:, None]
            tl.store(QUOTIENT + p_out + cols[None, :], factor.to(QUOTIENT.dtype.element_ty), mask=m_out)
        else:
            product = tl.where(valid[:, None], product, 0.0)
        tl.store(PRODUCT + p_out + cols[None, :], product.to(PRODUCT.dtype.element_ty), mask=m_out)
        d_phi = tl.dot(y.to(state.dtype), tl.trans(state), d_phi, input_precision=PRECISION)
    if OF_QUERIES:
        d_phi = d_phi / total[:, None]  # after the product: g / t may overflow float16
        d_total = -delta / total
        tl.store(D_TOTAL + bh * length + row, d_total, mask=inside)
        d_phi += d_total[:, None] * norm[None, :]
        tl.store(DELTA + bh * length + row, delta, mask=inside)
    else:
        d_phi += norm[None, :]
    dx = _feature_backward(x, phi.to(tl.float32), d_phi, FEATURE_MAP)
    dx = tl.where(valid[:, None], dx, 0.0)
    m_dx = inside[:, None] & (dims < D)[None, :]
    tl.store(DX + p_out + dims[None, :], dx.to(DX.dtype.element_ty), mask=m_dx)
