# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of ``block_linear_triton.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiling_triton import load_box, tile_tokens

__all__ = ["block_state_fwd_kernel", "feature", "finish_state_fwd_kernel", "marginal_norm_fwd_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def feature(x, FEATURE_MAP: tl.constexpr, D: tl.constexpr):
    """Feature map φ of the rows of x (rows, BLOCK_D) float32; columns from D on are padding and become 0."""
    cols = tl.arange(0, x.shape[1])
    key_mask = (cols < D)[None, :]
    if FEATURE_MAP == "softmax":
        x = tl.where(key_mask, x * LOG2E, -float("inf"))
        powers = tl.exp2(x - tl.max(x, 1)[:, None])
        return powers * (1.0 / tl.sum(powers, 1))[:, None]
    elif FEATURE_MAP == "elu":
        return tl.where(key_mask, tl.where(x > 0, x + 1, tl.exp(x)), 0.0)
    else:
        tl.static_assert(FEATURE_MAP == "relu", "FEATURE_MAP must be softmax, elu or relu")
        return tl.where(key_mask & ~(x < 0), x, 0.0)


@triton.jit(do_not_specialize=["first", "n_items"])
def block_state_fwd_kernel(
    k_ptr,
    v_ptr,
    w_ptr,
    key_mask_ptr,
    states_ptr,
    norms_ptr,
    K_BOXES,
    V_BOXES,
    STATES,
    NORM_WEIGHTS,
    first,
    n_heads,
    n_tiles,
    n_items,
    n_rows,
    length,
    before,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_vd,
    stride_mb,
    stride_ms,
    G0,
    G1,
    G2,
    scale,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    FOLD: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_NORM_WEIGHTS: tl.constexpr,
    IN_ONE: tl.constexpr,
    BOXES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """BLOCK_E columns of scale φ(k)ᵀ v Wᵀ of tiles of one head, with FOLD; without FOLD, W is left out.

    IN_ONE: a tile has at most BLOCK_N tokens, and a program loops over tiles; otherwise it computes one. BOXES > 0:
    tiles are loaded, and states stored, by tensor descriptor, all columns at once. HAS_NORM_WEIGHTS: each token has a
    weight in the sum of φ(k). φ is rounded to the dtype of the keys in state and norm alike, so that both use the same
    weights.
    """
    dims = tl.arange(0, BLOCK_D)
    cols = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    b_w = tl.zeros([BLOCK_D, BLOCK_E], k_ptr.dtype.element_ty)
    if FOLD:  # (BLOCK_D, BLOCK_E) Wᵀ
        p_w = w_ptr + cols[None, :] * D + dims[:, None]
        b_w = tl.load(p_w, mask=(cols < D)[None, :] & (dims < D)[:, None], other=0.0)
    if IN_ONE:
        for item in range(tl.program_id(0), n_items, tl.num_programs(0)):
            state = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
            state, b_phi = _add_tokens(
                state, b_w, k_ptr, v_ptr, key_mask_ptr, K_BOXES, V_BOXES, item, 0, first, n_heads, n_tiles, before,
                stride_kb, stride_kh, stride_ks, stride_kd, stride_vb, stride_vh, stride_vs, stride_vd, stride_mb,
                stride_ms, G0, G1, G2, B0, B1, B2, D, FEATURE_MAP, FOLD, HAS_KEY_MASK, BOXES, BLOCK_N, BLOCK_D, BLOCK_E,
            )  # fmt: skip
            b_phi = b_phi.to(tl.float32)
            if HAS_NORM_WEIGHTS:
                b_phi *= _norm_weights(
                    NORM_WEIGHTS, item, 0, first, n_tiles, length, before, G0, G1, G2, B0, B1, B2, BLOCK_N
                )[:, None]
            norm = tl.sum(b_phi, 0)
            _store_state(
                states_ptr, norms_ptr, STATES, state * scale, norm * scale, item, n_tiles, n_rows, D, BOXES, BLOCK_D,
                BLOCK_E,
            )  # fmt: skip
    else:
        begin = tl.program_id(0)
        state = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
        norm = tl.zeros([BLOCK_D, 16], tl.float32)
        for start in range(0, B0 * B1 * B2, BLOCK_N):
            state, b_phi = _add_tokens(
                state, b_w, k_ptr, v_ptr, key_mask_ptr, K_BOXES, V_BOXES, begin, start, first, n_heads, n_tiles, before,
                stride_kb, stride_kh, stride_ks, stride_kd, stride_vb, stride_vh, stride_vs, stride_vd, stride_mb,
                stride_ms, G0, G1, G2, B0, B1, B2, D, FEATURE_MAP, FOLD, HAS_KEY_MASK, 0, BLOCK_N, BLOCK_D, BLOCK_E,
            )  # fmt: skip
            # a product with ones has the sum in each column: a reduction over rows would need a barrier between all
            # warps
            b_ones = tl.full([BLOCK_N, 16], 1.0, v_ptr.dtype.element_ty)
            if HAS_NORM_WEIGHTS:
                norm_weight = _norm_weights(
                    NORM_WEIGHTS, begin, start, first, n_tiles, length, before, G0, G1, G2, B0, B1, B2, BLOCK_N
                )
                b_ones = (b_ones * norm_weight[:, None]).to(v_ptr.dtype.element_ty)
            norm = tl.dot(tl.trans(b_phi.to(b_ones.dtype)), b_ones, norm, input_precision="ieee")
        norm = tl.max(norm, 1) * scale
        _store_state(states_ptr, norms_ptr, STATES, state * scale, norm, begin, n_tiles, n_rows, D, 0, BLOCK_D, BLOCK_E)


@triton.jit
def _norm_weights(
    NORM_WEIGHTS, item, start, first, n_tiles, length, before, G0, G1, G2, B0: tl.constexpr, B1: tl.constexpr,
    B2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Norm weights (BLOCK_N,) float32 of tokens of a tile."""
    index, inside = tile_tokens(item % n_tiles, start + tl.arange(0, BLOCK_N), G0, G1, G2, B0, B1, B2)
    i_g = (first + item // n_tiles).to(tl.int64)
    return tl.load(NORM_WEIGHTS + i_g * length + before + index, mask=inside, other=0.0)


@triton.jit
def _add_tokens(
    state, b_w, k_ptr, v_ptr, key_mask_ptr, K_BOXES, V_BOXES, item, start, first, n_heads, n_tiles, before, stride_kb,
    stride_kh, stride_ks, stride_kd, stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_ms, G0, G1, G2,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, D: tl.constexpr, FEATURE_MAP: tl.constexpr,
    FOLD: tl.constexpr, HAS_KEY_MASK: tl.constexpr, BOXES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Add φ(k)ᵀ v Wᵀ of BLOCK_N tokens of a tile to ``state``; also return φ(k)."""
    tile = item % n_tiles
    i_g = (item // n_tiles).to(tl.int64)
    i_b = (first + i_g) // n_heads
    i_h = (first + i_g) % n_heads
    k_ptr += i_b * stride_kb + i_h * stride_kh
    v_ptr += i_b * stride_vb + i_h * stride_vh
    dtype = k_ptr.dtype.element_ty
    dims = tl.arange(0, BLOCK_D)
    index, inside = tile_tokens(tile, start + tl.arange(0, BLOCK_N), G0, G1, G2, B0, B1, B2)
    rows = (before + index).to(tl.int64)
    if HAS_KEY_MASK:
        inside = inside & (tl.load(key_mask_ptr + i_b * stride_mb + rows * stride_ms, mask=inside, other=0) != 0)
    m_rows = inside[:, None] & (dims < D)[None, :]
    # φ(k): (BLOCK_N, BLOCK_D)
    if BOXES > 0:
        b_k = load_box(
            K_BOXES, BOXES, i_b.to(tl.int32), i_h.to(tl.int32), n_heads, tile, 0, G1, G2, B0, B1, B2, BLOCK_N, BLOCK_D
        )
    else:
        p_k = k_ptr + rows[:, None] * stride_ks + dims[None, :].to(tl.int64) * stride_kd
        b_k = tl.load(p_k, mask=m_rows, other=0.0)
    b_phi = tl.where(inside[:, None], feature(b_k.to(tl.float32), FEATURE_MAP, D), 0.0).to(dtype)
    # v Wᵀ: (BLOCK_N, BLOCK_E)
    if FOLD:
        if BOXES > 0:
            b_v = load_box(
                V_BOXES,
                BOXES,
                i_b.to(tl.int32),
                i_h.to(tl.int32),
                n_heads,
                tile,
                0,
                G1,
                G2,
                B0,
                B1,
                B2,
                BLOCK_N,
                BLOCK_D,
            )
        else:
            p_v = v_ptr + rows[:, None] * stride_vs + dims[None, :].to(tl.int64) * stride_vd
            b_v = tl.load(p_v, mask=m_rows, other=0.0)
        b_v = tl.dot(b_v, b_w, input_precision="ieee").to(dtype)
    else:
        cols = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
        p_v = v_ptr + rows[:, None] * stride_vs + cols[None, :].to(tl.int64) * stride_vd
        b_v = tl.load(p_v, mask=inside[:, None] & (cols < D)[None, :], other=0.0)
    # float32 values of half-precision keys need the range of float32; TF32 is as precise as half precision
    PRECISION: tl.constexpr = "ieee" if k_ptr.dtype == v_ptr.dtype else "tf32"
    return tl.dot(tl.trans(b_phi.to(b_v.dtype)), b_v, state, input_precision=PRECISION), b_phi


@triton.jit
def _store_state(
    states_ptr, norms_ptr, STATES, state, norm, item, n_tiles, n_rows, D: tl.constexpr, BOXES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    cols = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    tile = item % n_tiles
    i_g = (item // n_tiles).to(tl.int64)
    if BOXES > 0:
        STATES.store([(item // n_tiles * n_rows + tile) * D, 0], state.to(STATES.dtype))
    else:
        p_state = states_ptr + (i_g * n_rows + tile) * D * D + dims[:, None] * D + cols[None, :]
        tl.store(p_state, state.to(states_ptr.dtype.element_ty), mask=(dims < D)[:, None] & (cols < D)[None, :])
    if tl.program_id(1) == 0:
        tl.store(norms_ptr + (i_g * n_tiles + tile) * D + dims, norm, mask=dims < D)


@triton.jit
def finish_state_fwd_kernel(
    states_ptr,
    norms_ptr,
    w_ptr,
    counts_ptr,
    state_ptr,
    norm_ptr,
    eps_ptr,
    n_heads,
    n_parts,
    n_grid,
    volume,
    epsilon,
    D: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PARTS: tl.constexpr,
):
    """BLOCK_M rows of the state of one head: the sum of the partial sums times volume / count times Wᵀ; also norm and
    eps."""
    i_g = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    m_rows = (rows < D)[:, None] & (dims < D)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    norm = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, n_parts, PARTS):
        for part in tl.static_range(PARTS):  # unrolled, so that the loads are in flight together
            i_part = i_g * n_parts + tl.minimum(first + part, n_parts - 1)
            norm_weight = tl.where(first + part < n_parts, 1.0, 0.0)
            p_part = states_ptr + i_part * D * D + rows[:, None] * D + dims[None, :]
            total += tl.load(p_part, mask=m_rows, other=0.0) * norm_weight
            norm += tl.load(norms_ptr + i_part * D + dims, mask=dims < D, other=0.0) * norm_weight
    count = tl.cast(n_grid, tl.float32)  # Triton specializes a length of 1 to a constant
    if HAS_COUNTS:
        count = tl.maximum(tl.load(counts_ptr + i_g // n_heads), 1).to(tl.float32)
    total *= volume / count
    for start in tl.static_range(0, D, BLOCK_E):
        cols = start + tl.arange(0, BLOCK_E)
        m_w = (cols < D)[:, None] & (dims < D)[None, :]
        b_w = tl.load(w_ptr + cols[:, None] * D + dims[None, :], mask=m_w, other=0.0).to(tl.float32)
        # (BLOCK_M, BLOCK_E) total Wᵀ
        folded = tl.dot(total, tl.trans(b_w), input_precision=PRECISION)
        p_state = state_ptr + i_g * D * D + rows[:, None] * D + cols[None, :]
        tl.store(p_state, folded.to(state_ptr.dtype.element_ty), mask=(rows < D)[:, None] & (cols < D)[None, :])
    if tl.program_id(1) == 0:
        tl.store(norm_ptr + i_g * D + dims, norm * (volume / count), mask=dims < D)
        tl.store(eps_ptr + i_g, epsilon / count)


@triton.jit
def marginal_norm_fwd_kernel(
    map_ptr,
    norms_ptr,
    out_ptr,
    n_q,
    n_k,
    stride_g,
    stride_m,
    stride_n,
    scale,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """BLOCK_E columns of scale map (BLOCK_M, n_k) @ norms (n_k, D) of one head, with float32 precision because the
    result is a denominator."""
    n_tiles = tl.cdiv(n_q, BLOCK_M)
    i_g = (tl.program_id(0) // n_tiles).to(tl.int64)
    rows = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(0, n_k, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        p_map = map_ptr + i_g * stride_g + rows[:, None].to(tl.int64) * stride_m + cols[None, :].to(tl.int64) * stride_n
        b_map = tl.load(p_map, mask=(rows < n_q)[:, None] & (cols < n_k)[None, :], other=0.0)
        p_norms = norms_ptr + (i_g * n_k + cols[:, None]) * D + dims[None, :]
        b_norms = tl.load(p_norms, mask=(cols < n_k)[:, None] & (dims < D)[None, :], other=0.0)
        acc = tl.dot(b_map.to(tl.float32), b_norms, acc, input_precision=PRECISION)
    p_out = out_ptr + (i_g * n_q + rows[:, None]) * D + dims[None, :]
    tl.store(p_out, acc * scale, mask=(rows < n_q)[:, None] & (dims < D)[None, :])
