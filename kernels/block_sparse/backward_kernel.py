# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of ``block_sparse_bwd_triton.py``.

With S = scale q kᵀ, P = exp(S - lse) and Δ = Σ dO O over the head dim: dV = Pᵀ dO, dS = P (dO vᵀ - Δ),
dQ = scale dS k, dK = scale dSᵀ q. One kernel loops over the keys of each query tile, the other over the queries of
each key tile; each program writes its own rows, so the order of summation is fixed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiling_triton import tile_places
from ..windows.visible_kernel import ball_weights, in_ball, in_interval, query_interval, token_at
from .forward_kernel import load_pair, load_rows, logits

__all__ = [
    "block_sparse_bwd_dkv_kernel",
    "block_sparse_bwd_dq_kernel",
    "load_lse_delta",
    "preprocess_bwd_kernel",
    "weights",
]

LOG2E = tl.constexpr(1.4426950408889634)
BLIND = tl.constexpr(float("inf"))  # log-sum-exp of a row without a visible key: its weights are then 0


@triton.jit
def preprocess_bwd_kernel(
    DO, OUT, LSE, LINEAR_DELTA, BIAS, LSE_DELTA, D_BIAS, sgb, sgh, sgr, sob, soh, sor, n_heads, length, before, n_grid,
    D: tl.constexpr, HAS_LINEAR_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Preprocess kernel: per row the log-sum-exp in units of log2, and Δ less LINEAR_DELTA and, on the grid, less the
    part of the bias. The partial gradients of the bias go to D_BIAS."""
    n_tiles = tl.cdiv(length, BLOCK_M)
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, h = bh // n_heads, bh % n_heads
    row = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    g = load_rows(DO + b * sgb + h * sgh, row, row < length, sgr, d, D, True).to(tl.float32)
    o = load_rows(OUT + b * sob + h * soh, row, row < length, sor, d, D, True).to(tl.float32)
    if HAS_BIAS:
        on_grid = ((row >= before) & (row < before + n_grid))[:, None]
        o -= tl.where(on_grid, tl.load(BIAS + d, mask=d < D, other=0.0).to(tl.float32)[None, :], 0.0)
        tl.store(D_BIAS + tl.program_id(0) * D + d, tl.sum(tl.where(on_grid, g, 0.0), 0), mask=d < D)
    delta = tl.sum(g * o, 1)
    if HAS_LINEAR_DELTA:
        delta -= tl.load(LINEAR_DELTA + bh * length + row, mask=row < length, other=0.0)
    lse = tl.load(LSE + bh * length + row, mask=row < length, other=0.0)
    p_row = LSE_DELTA + (bh * length + row) * 2
    tl.store(p_row, tl.where(lse == -float("inf"), BLIND, lse * LOG2E), mask=row < length)
    tl.store(p_row + 1, delta, mask=row < length)


@triton.jit
def load_lse_delta(LSE_DELTA, row, valid):
    """Log-sum-exp in units of log2 and Δ of rows. One load for both: each thread then loads one number, instead of all
    numbers that it needs later."""
    p_rows = LSE_DELTA + 2 * row.to(tl.int64)[:, None] + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(p_rows, mask=valid[:, None], other=0.0))


@triton.jit
def weights(x):
    """2**x, at most 1: with logits of 1e9, where float32 has a resolution of 64, rounding may give x > 0."""
    return tl.exp2(tl.minimum(x, 0.0))


@triton.jit
def _add_dq(
    dq, q, do, lse, delta, k, v, mask, scale, MASKED: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr
):
    """Add dS k of a tile of keys. mask: (queries, keys), or (1, keys)."""
    p = weights(logits(q, k, NEGATE, PRECISION) * scale - lse[:, None])
    if MASKED:
        p = tl.where(mask, p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _add_dq_rows(
    dq, q, do, lse, delta, K, V, KEY_MASK, row, valid, skr, svr, scale, d,
    D: tl.constexpr, HAS_KEY_MASK: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS k of keys at the given rows, visible to all queries if valid and not masked."""
    if HAS_KEY_MASK:
        valid = valid & (tl.load(KEY_MASK + row, mask=valid, other=0) != 0)
    k = load_rows(K, row, valid, skr, d, D, True)
    v = load_rows(V, row, valid, svr, d, D, True)
    return _add_dq(dq, q, do, lse, delta, k, v, valid[None, :], scale, True, NEGATE, PRECISION)


@triton.jit
def block_sparse_bwd_dq_kernel(
    Q, K, V, DO, LSE_DELTA, DQ, KEY_MASK, TILES, N_FULL, N_TILES, TABLES, BALL, POOLED_K, POOLED_V, POOLED_MASK,
    K_BOXES, V_BOXES, sqb, sqh, sqr, skb, skh, skr, svb, svh, svr, sgb, sgh, sgr, sdb, sdh, sdr, smb, spb, sph, spr,
    spmb, list_stride, n_q_heads, group, length_q, length_k, n_pooled, q_before, k_before,
    n_batch_heads, n_global_tiles, n_q_tiles, n_items, n_list, longest, scale, grad_scale, w0, w1, w2, limit,
    Q0, Q1, Q2, K0, K1, K2, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    QB0: tl.constexpr, QB1: tl.constexpr, QB2: tl.constexpr, KB0: tl.constexpr, KB1: tl.constexpr, KB2: tl.constexpr,
    Q_PARTS: tl.constexpr, K_PARTS: tl.constexpr, WHOLE: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_GLOBAL_QUERIES: tl.constexpr, HAS_GLOBAL_KEYS: tl.constexpr, HAS_POOLED: tl.constexpr,
    HAS_POOLED_MASK: tl.constexpr, IN0: tl.constexpr, IN1: tl.constexpr, IN2: tl.constexpr,
    BALL0: tl.constexpr, BALL1: tl.constexpr, BALL2: tl.constexpr, COST: tl.constexpr,
    OR0: tl.constexpr, OR1: tl.constexpr, OR2: tl.constexpr, HAS_ADD: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, in the order of the forward kernel. HAS_ADD: add the content of DQ to the gradient
    of grid queries."""
    pid = tl.program_id(0)
    w0, w1, w2, limit = ball_weights(BALL, w0, w1, w2, limit, COST)
    if HAS_GLOBAL_QUERIES:  # first, because they take longest
        is_global = pid < n_global_tiles * n_batch_heads
        local = tl.where(is_global, pid, pid - n_global_tiles * n_batch_heads)
        per_head = tl.where(is_global, n_global_tiles, n_items)
    else:
        is_global: tl.constexpr = False  # type: ignore[no-redef]
        local = pid
        per_head = n_items
    bh = local // per_head
    item = local % per_head
    b, h = bh // n_q_heads, bh % n_q_heads
    hk = h // group
    K += b.to(tl.int64) * skb + hk.to(tl.int64) * skh
    V += b.to(tl.int64) * svb + hk.to(tl.int64) * svh
    if HAS_KEY_MASK:
        KEY_MASK += b.to(tl.int64) * smb
    lane_k = tl.arange(0, BN)
    d = tl.arange(0, BLOCK_D)
    n_grid_q = Q0 * Q1 * Q2
    n_grid_k = K0 * K1 * K2
    tile_q = item // Q_PARTS
    box_lane = item % Q_PARTS * BM + tl.arange(0, BM)
    q0, q1, q2, valid_q = tile_places(tile_q, box_lane, Q0, Q1, Q2, QB0, QB1, QB2)
    row_q = q_before + token_at(TABLES, q0, q1, q2, valid_q, longest, Q1, Q2, OR0, OR1, OR2)
    if HAS_GLOBAL_QUERIES:
        off_grid = item * BM + tl.arange(0, BM)
        global_row = tl.where(off_grid < q_before, off_grid, off_grid + n_grid_q)
        row_q = tl.where(is_global, global_row, row_q)
        valid_q = tl.where(is_global, global_row < length_q, valid_q)
    q = load_rows(Q + b.to(tl.int64) * sqb + h.to(tl.int64) * sqh, row_q, valid_q, sqr, d, D, True)
    do = load_rows(DO + b.to(tl.int64) * sgb + h.to(tl.int64) * sgh, row_q, valid_q, sgr, d, D, True).to(q.dtype)
    lse, delta = load_lse_delta(LSE_DELTA + bh.to(tl.int64) * length_q * 2, row_q, valid_q)
    dq = tl.zeros((BM, BLOCK_D), dtype=tl.float32)
    if is_global:
        for i in range(tl.cdiv(length_k, BN)):
            row = i * BN + lane_k
            dq = _add_dq_rows(
                dq, q, do, lse, delta, K, V, KEY_MASK, row, row < length_k, skr, svr, scale, d, D, HAS_KEY_MASK, NEGATE,
                PRECISION,
            )  # fmt: skip
    else:
        p_list = TILES + bh.to(tl.int64) * list_stride + tile_q.to(tl.int64) * n_list
        g_list = tl.where(list_stride > 0, bh, 0) * n_q_tiles + tile_q
        n_tiles = tl.load(N_TILES + g_list)
        n_full = n_tiles
        if HAS_WINDOW:
            n_full = tl.load(N_FULL + g_list)
        for i in range(n_full * K_PARTS):
            tile = tl.load(p_list + i // K_PARTS)
            k0, k1, k2, valid = tile_places(tile, i % K_PARTS * BN + lane_k, K0, K1, K2, KB0, KB1, KB2)
            row = k_before + token_at(TABLES, k0, k1, k2, valid, longest, K1, K2, OR0, OR1, OR2)
            if HAS_KEY_MASK:
                valid = valid & (tl.load(KEY_MASK + row, mask=valid, other=0) != 0)
            k, v = load_pair(
                K, V, K_BOXES, V_BOXES, b, hk, n_q_heads // group, tile, i % K_PARTS, K1, K2, row, valid, skr, svr, d,
                KB0, KB1, KB2, D, BLOCK_D, BN, BOXES, not WHOLE,
            )  # fmt: skip
            dq = _add_dq(dq, q, do, lse, delta, k, v, valid[None, :], scale, not WHOLE, NEGATE, PRECISION)
        if HAS_WINDOW:
            if IN0:
                middle0, half0 = query_interval(TABLES, 0, q0, Q0, longest)
            if IN1:
                middle1, half1 = query_interval(TABLES, 1, q1, Q1, longest)
            if IN2:
                middle2, half2 = query_interval(TABLES, 2, q2, Q2, longest)
            o0, o1, o2, _ = tile_places(tile_q, 0, Q0, Q1, Q2, QB0, QB1, QB2)
            TYPE: tl.constexpr = tl.float64 if COST == 2 else tl.float32
            y0, y1, y2 = (q0 - o0).to(TYPE), (q1 - o1).to(TYPE), (q2 - o2).to(TYPE)
            for i in range(n_full * K_PARTS, n_tiles * K_PARTS):
                tile = tl.load(p_list + i // K_PARTS)
                k0, k1, k2, valid = tile_places(tile, i % K_PARTS * BN + lane_k, K0, K1, K2, KB0, KB1, KB2)
                row = k_before + token_at(TABLES, k0, k1, k2, valid, longest, K1, K2, OR0, OR1, OR2)
                if HAS_KEY_MASK:
                    valid = valid & (tl.load(KEY_MASK + row, mask=valid, other=0) != 0)
                k, v = load_pair(
                    K, V, K_BOXES, V_BOXES, b, hk, n_q_heads // group, tile, i % K_PARTS, K1, K2, row, valid, skr, svr,
                    d, KB0, KB1, KB2, D, BLOCK_D, BN, BOXES, True,
                )  # fmt: skip
                mask = valid[None, :]
                if IN0:
                    mask = mask & in_interval(k0, middle0, half0, False)
                if IN1:
                    mask = mask & in_interval(k1, middle1, half1, False)
                if IN2:
                    mask = mask & in_interval(k2, middle2, half2, False)
                if BALL0 or BALL1 or BALL2:
                    x0, x1, x2 = (k0 - o0).to(TYPE), (k1 - o1).to(TYPE), (k2 - o2).to(TYPE)
                    mask = mask & in_ball(x0, x1, x2, y0, y1, y2, w0, w1, w2, limit, BALL0, BALL1, BALL2, COST)
                dq = _add_dq(dq, q, do, lse, delta, k, v, mask, scale, True, NEGATE, PRECISION)
        if HAS_GLOBAL_KEYS:
            n_global = length_k - n_grid_k
            for i in range(tl.cdiv(n_global, BN)):
                row = i * BN + lane_k
                valid = row < n_global
                row = tl.where(row < k_before, row, row + n_grid_k)
                dq = _add_dq_rows(
                    dq,
                    q,
                    do,
                    lse,
                    delta,
                    K,
                    V,
                    KEY_MASK,
                    row,
                    valid,
                    skr,
                    svr,
                    scale,
                    d,
                    D,
                    HAS_KEY_MASK,
                    NEGATE,
                    PRECISION,
                )
        if HAS_POOLED:
            POOLED_K += b.to(tl.int64) * spb + hk.to(tl.int64) * sph
            POOLED_V += b.to(tl.int64) * spb + hk.to(tl.int64) * sph
            if HAS_POOLED_MASK:
                POOLED_MASK += b.to(tl.int64) * spmb
            for i in range(tl.cdiv(n_pooled, BN)):
                row = i * BN + lane_k
                dq = _add_dq_rows(
                    dq, q, do, lse, delta, POOLED_K, POOLED_V, POOLED_MASK, row, row < n_pooled, spr, spr, scale, d, D,
                    HAS_POOLED_MASK, NEGATE, PRECISION,
                )  # fmt: skip
    dq *= grad_scale
    p_dq = DQ + b.to(tl.int64) * sdb + h.to(tl.int64) * sdh + row_q.to(tl.int64)[:, None] * sdr + d[None, :]
    m_dq = valid_q[:, None] & (d < D)[None, :]
    if HAS_ADD:  # noqa: SIM102
        if not is_global:
            dq += tl.load(p_dq, mask=m_dq, other=0.0).to(tl.float32)
    tl.store(p_dq, dq.to(DQ.dtype.element_ty), mask=m_dq)


@triton.jit
def _add_dkv(
    dk, dv, k, v, q, do, LSE_DELTA, row, valid, mask, scale, MASKED: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dSᵀ q and Pᵀ dO of queries at the given rows. Keys are the rows of all products, so that the weights stay in
    registers from one product to the next. mask: (keys, queries)."""
    lse, delta = load_lse_delta(LSE_DELTA, row, valid)
    p = weights(logits(k, q, NEGATE, PRECISION) * scale - lse[None, :])
    if MASKED:
        p = tl.where(mask, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def block_sparse_bwd_dkv_kernel(
    Q, K, V, DO, LSE_DELTA, DK, DV, KEY_MASK, TILES, FIRST, N_FULL, N_TILES, TABLES, BALL, POOLED_K, POOLED_V,
    D_POOLED_K, D_POOLED_V, POOLED_MASK, Q_BOXES, DO_BOXES,
    sqb, sqh, sqr, skb, skh, skr, svb, svh, svr, sgb, sgh, sgr, sdb, sdh, sdr, smb, spb, sph, spr, sdpb, sdph, sdpr,
    spmb, list_stride, n_kv_heads, group, length_q, length_k, n_pooled, q_before, k_before,
    n_batch_heads, n_global_tiles, n_pooled_tiles, n_k_tiles, n_items, longest, scale, grad_scale, w0, w1, w2, limit,
    Q0, Q1, Q2, K0, K1, K2, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    QB0: tl.constexpr, QB1: tl.constexpr, QB2: tl.constexpr, KB0: tl.constexpr, KB1: tl.constexpr, KB2: tl.constexpr,
    Q_PARTS: tl.constexpr, K_PARTS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_GLOBAL_QUERIES: tl.constexpr, HAS_POOLED_MASK: tl.constexpr, IN0: tl.constexpr, IN1: tl.constexpr,
    IN2: tl.constexpr, BALL0: tl.constexpr, BALL1: tl.constexpr, BALL2: tl.constexpr, COST: tl.constexpr,
    OR0: tl.constexpr, OR1: tl.constexpr, OR2: tl.constexpr, HAS_ADD: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values. Global keys come first, then the pooled ones, because they take longest.
    HAS_ADD: add the content of DK and DV to the gradients of grid keys."""
    pid = tl.program_id(0)
    w0, w1, w2, limit = ball_weights(BALL, w0, w1, w2, limit, COST)
    n_off = n_global_tiles + n_pooled_tiles
    is_off = pid < n_off * n_batch_heads
    local = tl.where(is_off, pid, pid - n_off * n_batch_heads)
    per_head = tl.where(is_off, n_off, n_items)
    bh = local // per_head
    item = local % per_head
    is_pooled = is_off & (item >= n_global_tiles)
    b, hk = (bh // n_kv_heads).to(tl.int64), (bh % n_kv_heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    lane_q = tl.arange(0, BM)
    lane_k = tl.arange(0, BN)
    n_grid_q = Q0 * Q1 * Q2
    n_grid_k = K0 * K1 * K2
    # keys: grid, global or pooled
    tile_k = item // K_PARTS
    k0, k1, k2, valid_k = tile_places(tile_k, item % K_PARTS * BN + lane_k, K0, K1, K2, KB0, KB1, KB2)
    row_k = k_before + token_at(TABLES, k0, k1, k2, valid_k, longest, K1, K2, OR0, OR1, OR2)
    off_grid = item * BN + lane_k
    global_row = tl.where(off_grid < k_before, off_grid, off_grid + n_grid_k)
    row_k = tl.where(is_off, global_row, row_k)
    valid_k = tl.where(is_off, global_row < length_k, valid_k)
    pooled_row = (item - n_global_tiles) * BN + lane_k
    row_k = tl.where(is_pooled, pooled_row, row_k)
    valid_k = tl.where(is_pooled, pooled_row < n_pooled, valid_k)
    K += b * skb + hk * skh
    V += b * svb + hk * svh
    DK += b * sdb + hk * sdh
    DV += b * sdb + hk * sdh
    kr, vr, dr = tl.where(is_pooled, spr, skr), tl.where(is_pooled, spr, svr), tl.where(is_pooled, sdpr, sdr)
    visible = valid_k
    if HAS_KEY_MASK:
        of_sequence = tl.where(is_pooled, off_grid < 0, valid_k)
        masked = tl.load(KEY_MASK + b * smb + row_k, mask=of_sequence, other=1) == 0
        visible = tl.where(masked, off_grid < 0, visible)
    if is_pooled:
        K = POOLED_K + b * spb + hk * sph
        V = POOLED_V + b * spb + hk * sph
        DK = D_POOLED_K + b * sdpb + hk * sdph
        DV = D_POOLED_V + b * sdpb + hk * sdph
        if HAS_POOLED_MASK:
            visible = visible & (tl.load(POOLED_MASK + b * spmb + row_k, mask=valid_k, other=0) != 0)
    k = load_rows(K, row_k, visible, kr, d, D, True)
    v = load_rows(V, row_k, visible, vr, d, D, True)
    dk = tl.zeros((BN, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BN, BLOCK_D), dtype=tl.float32)
    for i_head in range(group):
        h = hk * group + i_head
        bhq = b * n_kv_heads * group + h
        p_q = Q + b * sqb + h * sqh
        p_do = DO + b * sgb + h * sgh
        p_lse_delta = LSE_DELTA + bhq * length_q * 2
        # queries that attend to all of these keys: the global ones, all, or those of the grid
        begin = tl.where(is_pooled, q_before, 0)
        n_rows = tl.where(is_pooled, n_grid_q, tl.where(is_off, length_q, length_q - n_grid_q))
        if HAS_GLOBAL_QUERIES or is_off:
            for i in range(tl.cdiv(n_rows, BM)):
                row = begin + i * BM + lane_q
                valid = i * BM + lane_q < n_rows
                row = tl.where(is_off | (row < q_before), row, row + n_grid_q)
                q = load_rows(p_q, row, valid, sqr, d, D, True)
                do = load_rows(p_do, row, valid, sgr, d, D, True).to(q.dtype)
                dk, dv = _add_dkv(
                    dk, dv, k, v, q, do, p_lse_delta, row, valid, valid[None, :], scale, False, NEGATE, PRECISION
                )
        if is_off == 0:
            g_list = tl.where(list_stride > 0, bhq, 0) * n_k_tiles + tile_k
            p_list = TILES + tl.where(list_stride > 0, bhq, 0) * list_stride + tl.load(FIRST + g_list)
            n_tiles = tl.load(N_TILES + g_list)
            n_full = n_tiles
            if HAS_WINDOW:
                n_full = tl.load(N_FULL + g_list)
            for i in range(n_full * Q_PARTS):
                tile = tl.load(p_list + i // Q_PARTS)
                q0, q1, q2, valid = tile_places(tile, i % Q_PARTS * BM + lane_q, Q0, Q1, Q2, QB0, QB1, QB2)
                row = q_before + token_at(TABLES, q0, q1, q2, valid, longest, Q1, Q2, OR0, OR1, OR2)
                q, do = load_pair(
                    p_q, p_do, Q_BOXES, DO_BOXES, b, h, n_kv_heads * group, tile, i % Q_PARTS, Q1, Q2, row, valid, sqr,
                    sgr, d, QB0, QB1, QB2, D, BLOCK_D, BM, BOXES, True,
                )  # fmt: skip
                dk, dv = _add_dkv(
                    dk, dv, k, v, q, do, p_lse_delta, row, valid, valid[None, :], scale, False, NEGATE, PRECISION
                )
            if HAS_WINDOW:
                o0, o1, o2, _ = tile_places(tile_k, 0, K0, K1, K2, KB0, KB1, KB2)
                TYPE: tl.constexpr = tl.float64 if COST == 2 else tl.float32
                y0, y1, y2 = (k0 - o0).to(TYPE), (k1 - o1).to(TYPE), (k2 - o2).to(TYPE)
                for i in range(n_full * Q_PARTS, n_tiles * Q_PARTS):
                    tile = tl.load(p_list + i // Q_PARTS)
                    q0, q1, q2, valid = tile_places(tile, i % Q_PARTS * BM + lane_q, Q0, Q1, Q2, QB0, QB1, QB2)
                    row = q_before + token_at(TABLES, q0, q1, q2, valid, longest, Q1, Q2, OR0, OR1, OR2)
                    mask = valid[None, :]
                    if IN0:
                        middle, half = query_interval(TABLES, 0, q0, Q0, longest)
                        mask = mask & in_interval(k0, middle, half, True)
                    if IN1:
                        middle, half = query_interval(TABLES, 1, q1, Q1, longest)
                        mask = mask & in_interval(k1, middle, half, True)
                    if IN2:
                        middle, half = query_interval(TABLES, 2, q2, Q2, longest)
                        mask = mask & in_interval(k2, middle, half, True)
                    if BALL0 or BALL1 or BALL2:
                        x0, x1, x2 = (q0 - o0).to(TYPE), (q1 - o1).to(TYPE), (q2 - o2).to(TYPE)
                        mask = mask & in_ball(x0, x1, x2, y0, y1, y2, w0, w1, w2, limit, BALL0, BALL1, BALL2, COST)
                    q, do = load_pair(
                        p_q, p_do, Q_BOXES, DO_BOXES, b, h, n_kv_heads * group, tile, i % Q_PARTS, Q1, Q2, row, valid,
                        sqr, sgr, d, QB0, QB1, QB2, D, BLOCK_D, BM, BOXES, True,
                    )  # fmt: skip
                    dk, dv = _add_dkv(
                        dk, dv, k, v, q, do, p_lse_delta, row, valid, mask, scale, True, NEGATE, PRECISION
                    )
    # masked keys were loaded as zeros: their gradients are 0
    dk = tl.where(visible[:, None], dk * grad_scale, 0.0)
    dv = tl.where(visible[:, None], dv, 0.0)
    offset = row_k.to(tl.int64)[:, None] * dr + d[None, :]
    m_d = valid_k[:, None] & (d < D)[None, :]
    if HAS_ADD:  # noqa: SIM102
        if is_off == 0:
            dk += tl.load(DK + offset, mask=m_d, other=0.0).to(tl.float32)
            dv += tl.load(DV + offset, mask=m_d, other=0.0).to(tl.float32)
    tl.store(DK + offset, dk.to(DK.dtype.element_ty), mask=m_d)
    tl.store(DV + offset, dv.to(DV.dtype.element_ty), mask=m_d)
