# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernel of ``block_linear/backward.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention_kernel import attended, head_of, load_rows
from ..tiling_kernel import tile_tokens
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
    x, y, p_states, p_norms, d_x, p_product, of_queries, key_mask, n_heads, n_tiles, tokens, S: tl.constexpr
):  # fmt: skip
    """Gradients of BLOCK_N rows of a tile of one head. p_product and quotient have the strides of d_x.

    Queries (x = q, y = the gradient before the projection g, states A, norms z): u = φ(q) A / t with t = φ(q)·z + eps
    to p_product, g / t to quotient, -g·u / t to d_total, g·u to delta, and φ'(q) (g Aᵀ / t - z g·u / t) to d_x.
    Keys (x = k, y = v, states dA, norms dz): φ(k) dA to p_product and φ'(k) (v dAᵀ + dz) to d_x; 0 for masked keys.
    """
    BOX: tl.constexpr = S.BOX
    FEATURE_MAP: tl.constexpr = S.FEATURE_MAP
    part = tl.program_id(0) % S.PARTS
    tile = tl.program_id(0) // S.PARTS % n_tiles
    bh = (tl.program_id(0) // (S.PARTS * n_tiles)).to(tl.int64)
    b, h = bh // n_heads, bh % n_heads
    d = tl.arange(0, S.BLOCK_D)
    index, inside = tile_tokens(tile, part * S.BLOCK_N + tl.arange(0, S.BLOCK_N), tokens, BOX)
    row = tokens.before + index
    valid = attended(key_mask, b, row, inside)
    p_y = head_of(y, b, h)
    # (BLOCK_N, BLOCK_D)
    if S.BLOCK_E == S.BLOCK_D:  # the load overlaps the computation of φ(x)
        b_y = load_rows(p_y, row, valid, y.row, d, S.D, True)
    b_x = load_rows(head_of(x, b, h), row, valid, x.row, d, S.D, True)
    dtype = b_x.dtype
    b_x = b_x.to(tl.float32)
    b_phi = feature(b_x, FEATURE_MAP, S.D).to(dtype)
    which = bh
    if S.BY_TILE:
        which = bh * n_tiles + tile
    p_state = p_states + which * S.D * S.D
    b_norm = tl.load(p_norms + which * S.D + d, mask=d < S.D, other=0.0)
    total = tl.full((S.BLOCK_N,), 1.0, tl.float32)
    delta = tl.full((S.BLOCK_N,), 0.0, tl.float32)
    if of_queries.eps is not None:
        total = tl.sum(b_phi.to(tl.float32) * b_norm[None, :], 1)
        # 0 if φ(q) and all summed φ(k) have disjoint support: every numerator is then 0 as well
        total = tl.where(total == 0, 1.0, total + tl.load(of_queries.eps + bh))
    offset = b * d_x.batch + h * d_x.head + row.to(tl.int64)[:, None] * d_x.row
    d_phi = tl.full((S.BLOCK_N, S.BLOCK_D), 0.0, tl.float32)
    for start in range(0, S.BLOCK_D, S.BLOCK_E):
        cols = start + tl.arange(0, S.BLOCK_E)
        m_out = inside[:, None] & (cols < S.D)[None, :]
        if S.BLOCK_E < S.BLOCK_D:
            b_y = load_rows(p_y, row, valid, y.row, cols, S.D, True)
        m_state = (d < S.D)[:, None] & (cols < S.D)[None, :]
        b_state = tl.load(p_state + d[:, None] * S.D + cols[None, :], mask=m_state, other=0.0)
        product = tl.dot(b_phi.to(b_state.dtype), b_state, input_precision=S.PRECISION)
        if of_queries.eps is not None:
            product = product / total[:, None]
            delta += tl.sum(product * b_y.to(tl.float32), 1)
            factor = b_y.to(tl.float32) / total[:, None]
            p_quotient = of_queries.quotient + offset + cols[None, :]
            tl.store(p_quotient, factor.to(of_queries.quotient.dtype.element_ty), mask=m_out)
        else:
            product = tl.where(valid[:, None], product, 0.0)
        tl.store(p_product + offset + cols[None, :], product.to(p_product.dtype.element_ty), mask=m_out)
        d_phi = tl.dot(b_y.to(b_state.dtype), tl.trans(b_state), d_phi, input_precision=S.PRECISION)
    if of_queries.eps is not None:
        d_phi = d_phi / total[:, None]  # after the product: g / t may overflow float16
        d_total = -delta / total
        tl.store(of_queries.d_total + bh * tokens.length + row, d_total, mask=inside)
        d_phi += d_total[:, None] * b_norm[None, :]
        tl.store(of_queries.delta + bh * tokens.length + row, delta, mask=inside)
    else:
        d_phi += b_norm[None, :]
    dx = _feature_backward(b_x, b_phi.to(tl.float32), d_phi, FEATURE_MAP)
    dx = tl.where(valid[:, None], dx, 0.0)
    tl.store(
        d_x.data + offset + d[None, :], dx.to(d_x.data.dtype.element_ty), mask=inside[:, None] & (d < S.D)[None, :]
    )
