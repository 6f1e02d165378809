# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of ``block_linear/forward.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention_kernel import attended, head_of, load_rows
from ..tiling_kernel import load_box, tile_tokens

__all__ = ["block_state_fwd_kernel", "feature", "finish_state_fwd_kernel", "marginal_norm_fwd_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def feature(x, FEATURE_MAP: tl.constexpr, D: tl.constexpr):
    """Feature map φ of the rows of x (rows, BLOCK_D) float32; columns from D on are padding and become 0."""
    m_cols = (tl.arange(0, x.shape[1]) < D)[None, :]
    if FEATURE_MAP == "softmax":
        x = tl.where(m_cols, x * LOG2E, -float("inf"))
        powers = tl.exp2(x - tl.max(x, 1)[:, None])
        return powers * (1.0 / tl.sum(powers, 1))[:, None]
    elif FEATURE_MAP == "elu":
        return tl.where(m_cols, tl.where(x > 0, x + 1, tl.exp(x)), 0.0)
    else:
        tl.static_assert(FEATURE_MAP == "relu", "FEATURE_MAP must be softmax, elu or relu")
        return tl.where(m_cols & ~(x < 0), x, 0.0)


@triton.jit
def _load_norm_weights(p_norm_weights, item, start, first, n_tiles, tokens, S: tl.constexpr):
    """Load the norm weights (BLOCK_N,) float32 of tokens of a tile."""
    BOX: tl.constexpr = S.BOX
    index, inside = tile_tokens(item % n_tiles, start + tl.arange(0, S.BLOCK_N), tokens, BOX)
    p_head = p_norm_weights + (first + item // n_tiles).to(tl.int64) * tokens.length
    return tl.load(p_head + tokens.before + index, mask=inside, other=0.0)


@triton.jit
def _add_tokens(
    state, b_w, key, value, key_mask, k_boxes, v_boxes, item, start, first, n_heads, n_tiles, tokens, S: tl.constexpr
):  # fmt: skip
    """Add BLOCK_N tokens of a tile to ``state``; also return φ(k). b_w: Wᵀ, None = without W."""
    BOX: tl.constexpr = S.BOX
    BOXES: tl.constexpr = S.BOXES
    FEATURE_MAP: tl.constexpr = S.FEATURE_MAP
    tile = item % n_tiles
    bh = first + (item // n_tiles).to(tl.int64)
    b, h = bh // n_heads, bh % n_heads
    d = tl.arange(0, S.BLOCK_D)
    index, valid = tile_tokens(tile, start + tl.arange(0, S.BLOCK_N), tokens, BOX)
    row = tokens.before + index
    valid = attended(key_mask, b, row, valid)
    # (BLOCK_N, BLOCK_D)
    if S.BOXES != "none":
        b, h = b.to(tl.int32), h.to(tl.int32)
        b_k = load_box(k_boxes, b, h, n_heads, tile, 0, tokens, BOX, S.BLOCK_N, S.BLOCK_D, BOXES)
    else:
        b_k = load_rows(head_of(key, b, h), row, valid, key.row, d, S.D, True)
    b_phi = tl.where(valid[:, None], feature(b_k.to(tl.float32), FEATURE_MAP, S.D), 0.0).to(b_k.dtype)
    # (BLOCK_N, BLOCK_E)
    if b_w is not None:
        if S.BOXES != "none":
            b_v = load_box(v_boxes, b, h, n_heads, tile, 0, tokens, BOX, S.BLOCK_N, S.BLOCK_D, BOXES)
        else:
            b_v = load_rows(head_of(value, b, h), row, valid, value.row, d, S.D, True)
        b_v = tl.dot(b_v, b_w, input_precision="ieee").to(b_k.dtype)
    else:
        cols = tl.program_id(1) * S.BLOCK_E + tl.arange(0, S.BLOCK_E)
        b_v = load_rows(head_of(value, b, h), row, valid, value.row, cols, S.D, True)
    return tl.dot(tl.trans(b_phi.to(b_v.dtype)), b_v, state, input_precision=S.PRECISION), b_phi


@triton.jit
def _store_state(p_states, p_norms, state_boxes, state, norm, item, n_tiles, n_rows, S: tl.constexpr):
    """Store the state (BLOCK_D, BLOCK_E) and norm (BLOCK_D,) of a tile, of n_rows states per head."""
    d, cols = tl.arange(0, S.BLOCK_D), tl.program_id(1) * S.BLOCK_E + tl.arange(0, S.BLOCK_E)
    tile, group = item % n_tiles, (item // n_tiles).to(tl.int64)
    if S.BOXES != "none":
        state_boxes.store([(item // n_tiles * n_rows + tile) * S.D, 0], state.to(state_boxes.dtype))
    else:
        p_state = p_states + (group * n_rows + tile) * S.D * S.D + d[:, None] * S.D + cols[None, :]
        tl.store(p_state, state.to(p_states.dtype.element_ty), mask=(d < S.D)[:, None] & (cols < S.D)[None, :])
    if tl.program_id(1) == 0:
        tl.store(p_norms + (group * n_tiles + tile) * S.D + d, norm, mask=d < S.D)


@triton.jit(do_not_specialize=["first", "n_items"])
def block_state_fwd_kernel(
    key, value, p_weight, key_mask, p_norm_weights, p_states, p_norms, k_boxes, v_boxes, state_boxes, first, n_heads,
    n_tiles, n_items, n_rows, tokens, scale, S: tl.constexpr,
):  # fmt: skip
    """BLOCK_E columns of scale φ(k)ᵀ v Wᵀ of tiles of one head; p_weight None = without W.

    A program loops over tiles if they have one part, otherwise it computes one tile. With BOXES, tiles are loaded, and
    states stored, by tensor descriptor, all columns at once. p_norm_weights: weight of each token in the sum of φ(k),
    None = 1. φ is rounded to the dtype of the keys in state and norm alike, so that both use the same weights.
    """
    d, cols = tl.arange(0, S.BLOCK_D), tl.program_id(1) * S.BLOCK_E + tl.arange(0, S.BLOCK_E)
    b_w = None
    if p_weight is not None:  # (BLOCK_D, BLOCK_E) Wᵀ
        m_w = (cols < S.D)[None, :] & (d < S.D)[:, None]
        b_w = tl.load(p_weight + cols[None, :] * S.D + d[:, None], mask=m_w, other=0.0)
    if S.PARTS == 1:
        for item in range(tl.program_id(0), n_items, tl.num_programs(0)):
            state = tl.full((S.BLOCK_D, S.BLOCK_E), 0.0, tl.float32)
            state, b_phi = _add_tokens(
                state, b_w, key, value, key_mask, k_boxes, v_boxes, item, 0, first, n_heads, n_tiles, tokens, S
            )
            b_phi = b_phi.to(tl.float32)
            if p_norm_weights is not None:
                b_phi *= _load_norm_weights(p_norm_weights, item, 0, first, n_tiles, tokens, S)[:, None]
            norm = tl.sum(b_phi, 0)
            _store_state(p_states, p_norms, state_boxes, state * scale, norm * scale, item, n_tiles, n_rows, S)
    else:
        item = tl.program_id(0)
        state = tl.full((S.BLOCK_D, S.BLOCK_E), 0.0, tl.float32)
        norm = tl.full((S.BLOCK_D, 16), 0.0, tl.float32)
        for start in range(0, S.BOX[0] * S.BOX[1] * S.BOX[2], S.BLOCK_N):
            state, b_phi = _add_tokens(
                state, b_w, key, value, key_mask, k_boxes, v_boxes, item, start, first, n_heads, n_tiles, tokens, S
            )
            # a product with ones has the sum in each column: a reduction over rows would need a barrier between all
            # warps
            b_ones = tl.full((S.BLOCK_N, 16), 1.0, value.data.dtype.element_ty)
            if p_norm_weights is not None:
                b_weights = _load_norm_weights(p_norm_weights, item, start, first, n_tiles, tokens, S)
                b_ones = (b_ones * b_weights[:, None]).to(b_ones.dtype)
            norm = tl.dot(tl.trans(b_phi.to(b_ones.dtype)), b_ones, norm, input_precision="ieee")
        norm = tl.max(norm, 1) * scale
        _store_state(p_states, p_norms, state_boxes, state * scale, norm, item, n_tiles, n_rows, S)


@triton.jit
def finish_state_fwd_kernel(
    p_parts, p_part_norms, p_weight, p_counts, p_state, p_norm, p_eps, n_heads, n_parts, n_grid, volume, epsilon,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of the state of one head: the sum of the partial sums times volume / count times Wᵀ; also norm and
    eps. p_counts: count of each batch element, None = n_grid."""
    bh = tl.program_id(0).to(tl.int64)
    row, d = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_rows = (row < D)[:, None] & (d < D)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    norm = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, n_parts, UNROLL):
        for i in tl.static_range(UNROLL):  # unrolled, so that the loads are in flight together
            part = bh * n_parts + tl.minimum(first + i, n_parts - 1)
            counted = tl.where(first + i < n_parts, 1.0, 0.0)
            p_part = p_parts + part * D * D + row[:, None] * D + d[None, :]
            total += tl.load(p_part, mask=m_rows, other=0.0) * counted
            norm += tl.load(p_part_norms + part * D + d, mask=d < D, other=0.0) * counted
    count = tl.cast(n_grid, tl.float32)  # Triton specializes a length of 1 to a constant
    if p_counts is not None:
        count = tl.maximum(tl.load(p_counts + bh // n_heads), 1).to(tl.float32)
    total *= volume / count
    for start in tl.static_range(0, D, BLOCK_E):
        cols = start + tl.arange(0, BLOCK_E)
        m_w = (cols < D)[:, None] & (d < D)[None, :]
        b_w = tl.load(p_weight + cols[:, None] * D + d[None, :], mask=m_w, other=0.0).to(tl.float32)
        # (BLOCK_M, BLOCK_E) total Wᵀ
        b_state = tl.dot(total, tl.trans(b_w), input_precision=PRECISION)
        p_rows = p_state + bh * D * D + row[:, None] * D + cols[None, :]
        tl.store(p_rows, b_state.to(p_state.dtype.element_ty), mask=(row < D)[:, None] & (cols < D)[None, :])
    if tl.program_id(1) == 0:
        tl.store(p_norm + bh * D + d, norm * (volume / count), mask=d < D)
        tl.store(p_eps + bh, epsilon / count)


@triton.jit
def marginal_norm_fwd_kernel(
    p_map, p_norms, p_out, strides, n_q, n_k, scale, D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_E columns of scale map (BLOCK_M, n_k) @ norms (n_k, D) of one head, with float32 precision because the
    result is a denominator. strides: of the map, (B*H, n_q, n_k)."""
    n_tiles = tl.cdiv(n_q, BLOCK_M)
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    row = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    p_rows = p_map + bh * strides[0] + row[:, None].to(tl.int64) * strides[1]
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(0, n_k, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        p_cols = p_rows + col[None, :].to(tl.int64) * strides[2]
        b_map = tl.load(p_cols, mask=(row < n_q)[:, None] & (col < n_k)[None, :], other=0.0)
        p_d = p_norms + (bh * n_k + col[:, None]) * D + d[None, :]
        b_norms = tl.load(p_d, mask=(col < n_k)[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(b_map.to(tl.float32), b_norms, acc, input_precision=PRECISION)
    p_o = p_out + (bh * n_q + row[:, None]) * D + d[None, :]
    tl.store(p_o, acc * scale, mask=(row < n_q)[:, None] & (d < D)[None, :])
