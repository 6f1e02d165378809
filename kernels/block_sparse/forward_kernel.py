# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernel of ``block_sparse_triton.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_linear.forward_kernel import feature
from ..tiling_triton import load_box, tile_places
from ..windows.visible_kernel import ball_weights, in_ball, in_interval, query_interval, token_at

__all__ = ["block_sparse_fwd_kernel", "load_pair", "load_rows", "logits"]

HIDDEN = tl.constexpr(float("-inf"))
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(x, row, valid, stride, d, D: tl.constexpr, MASKED: tl.constexpr):
    """Load rows (n, BLOCK_D) of x; zeros if not valid and past D."""
    p_x = x + row.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(p_x, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    if d.shape[0] != D:
        return tl.load(p_x, mask=(d < D)[None, :], other=0.0)
    return tl.load(p_x)


@triton.jit
def load_pair(
    X, Y, X_BOXES, Y_BOXES, b, h, n_heads, tile, part, G1, G2, row, valid, stride_x, stride_y, d, B0: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BOXES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load part of a tile of two tensors, such as keys and values: by descriptor, or the given rows by pointers."""
    if BOXES > 0:
        b, h = b.to(tl.int32), h.to(tl.int32)
        x = load_box(X_BOXES, BOXES, b, h, n_heads, tile, part, G1, G2, B0, B1, B2, BLOCK_N, BLOCK_D)
        y = load_box(Y_BOXES, BOXES, b, h, n_heads, tile, part, G1, G2, B0, B1, B2, BLOCK_N, BLOCK_D)
    else:
        x = load_rows(X, row, valid, stride_x, d, D, MASKED)
        y = load_rows(Y, row, valid, stride_y, d, D, MASKED).to(x.dtype)
    return x, y


@triton.jit
def logits(q, k, NEGATE: tl.constexpr, PRECISION: tl.constexpr):
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if NEGATE:
        s = -s
    return s


@triton.jit
def _update(acc, m, l, s, v, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax; s are logits without their scale, which is positive and in units of log2."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    shift = m_new
    if MASKED:  # a row without a visible key so far must not give -inf - -inf
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * scale - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, l


@triton.jit
def _attend_rows(
    acc, m, l, q, K, V, KEY_MASK, row, valid, skr, svr, scale, d,
    D: tl.constexpr, HAS_KEY_MASK: tl.constexpr, MASKED: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to keys at the given rows, visible to all queries if valid and not masked."""
    if HAS_KEY_MASK:
        valid = valid & (tl.load(KEY_MASK + row, mask=valid, other=0) != 0)
    k = load_rows(K, row, valid, skr, d, D, MASKED)
    v = load_rows(V, row, valid, svr, d, D, MASKED)
    s = logits(q, k, NEGATE, PRECISION)
    if MASKED:
        s = tl.where(valid[None, :], s, float("-inf"))
    return _update(acc, m, l, s, v, scale, MASKED, PRECISION)


@triton.jit
def _store_linear(
    p_o, m_rows, q, STATE, NORM, EPS, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    FEATURE_MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store φ(q) state / (φ(q)·norm + eps) to rows (BM,) of the output, BLOCK_E columns at a time: the whole state of a
    large head exceeds the shared memory."""
    d = tl.arange(0, BLOCK_D)
    phi = feature(q.to(tl.float32), FEATURE_MAP, D)
    norm = tl.load(NORM + d, mask=d < D, other=0.0)
    total = tl.sum(phi * norm[None, :], 1) + tl.load(EPS)
    total = tl.where(total == 0, 1.0, total)[:, None]
    phi = phi.to(STATE.dtype.element_ty)
    for start in range(0, BLOCK_D, BLOCK_E):
        cols = start + tl.arange(0, BLOCK_E)
        m_state = (d < D)[:, None] & (cols < D)[None, :]
        state = tl.load(STATE + d[:, None] * D + cols[None, :], mask=m_state, other=0.0)
        linear = tl.dot(phi, state, input_precision=PRECISION) / total
        m_o = m_rows[:, None] & (cols < D)[None, :]
        tl.store(p_o[:, None] + cols[None, :], linear.to(p_o.dtype.element_ty), mask=m_o)


@triton.jit
def block_sparse_fwd_kernel(
    Q, K, V, OUT, LSE, KEY_MASK, TILES, N_FULL, N_TILES, TABLES, BALL, POOLED_K, POOLED_V, POOLED_MASK, STATE, NORM,
    EPS, BIAS, K_BOXES, V_BOXES, sqb, sqh, sqr, skb, skh, skr, svb, svh, svr, sob, soh, sor, smb, spb, sph, spr, spmb,
    list_stride, n_q_heads, group, length_q, length_k, n_pooled, q_before, k_before,
    n_batch_heads, n_global_tiles, n_q_tiles, n_items, n_list, longest, scale, w0, w1, w2, limit,
    Q0, Q1, Q2, K0, K1, K2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
    QB0: tl.constexpr, QB1: tl.constexpr, QB2: tl.constexpr, KB0: tl.constexpr, KB1: tl.constexpr, KB2: tl.constexpr,
    Q_PARTS: tl.constexpr, K_PARTS: tl.constexpr, FULL: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, HAS_GLOBAL_QUERIES: tl.constexpr, HAS_GLOBAL_KEYS: tl.constexpr,
    HAS_POOLED: tl.constexpr, HAS_POOLED_MASK: tl.constexpr, IN0: tl.constexpr, IN1: tl.constexpr, IN2: tl.constexpr,
    BALL0: tl.constexpr, BALL1: tl.constexpr, BALL2: tl.constexpr, COST: tl.constexpr,
    OR0: tl.constexpr, OR1: tl.constexpr, OR2: tl.constexpr, HAS_LSE: tl.constexpr, STATE_MODE: tl.constexpr,
    HAS_BIAS: tl.constexpr, FEATURE_MAP: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    BOXES: tl.constexpr,
):  # fmt: skip
    # query tile, batch element and head
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
    Q += b.to(tl.int64) * sqb + h.to(tl.int64) * sqh
    K += b.to(tl.int64) * skb + hk.to(tl.int64) * skh
    V += b.to(tl.int64) * svb + hk.to(tl.int64) * svh
    if HAS_KEY_MASK:
        KEY_MASK += b.to(tl.int64) * smb

    lane_q = tl.arange(0, BM)
    lane_k = tl.arange(0, BN)
    d = tl.arange(0, BLOCK_D)
    n_grid_q = Q0 * Q1 * Q2
    n_grid_k = K0 * K1 * K2
    tile_q = item // Q_PARTS
    box_lane = item % Q_PARTS * BM + lane_q
    # (BM,) row of each query in the sequence
    q0, q1, q2, valid_q = tile_places(tile_q, box_lane, Q0, Q1, Q2, QB0, QB1, QB2)
    row_q = q_before + token_at(TABLES, q0, q1, q2, valid_q, longest, Q1, Q2, OR0, OR1, OR2)
    if HAS_GLOBAL_QUERIES:
        off_grid = item * BM + lane_q
        global_row = tl.where(off_grid < q_before, off_grid, off_grid + n_grid_q)
        row_q = tl.where(is_global, global_row, row_q)
        valid_q = tl.where(is_global, global_row < length_q, valid_q)
    q = load_rows(Q, row_q, valid_q, sqr, d, D, True)
    p_rows = OUT + b.to(tl.int64) * sob + h.to(tl.int64) * soh + row_q.to(tl.int64) * sor
    p_o = p_rows[:, None] + d[None, :]
    m_o = valid_q[:, None] & (d < D)[None, :]
    if STATE_MODE > 0:  # noqa: SIM102
        if not is_global:  # kept in the output until the end: the softmax needs the registers
            which = bh.to(tl.int64)
            if STATE_MODE == 2:
                which = which * n_q_tiles + tile_q
            _store_linear(
                p_rows, valid_q, q, STATE + which * D * D, NORM + which * D, EPS + bh, D, BLOCK_D, BLOCK_E, FEATURE_MAP,
                PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
    acc = tl.zeros((BM, BLOCK_D), dtype=tl.float32)
    m = tl.full((BM,), float("-inf"), dtype=tl.float32)
    l = tl.zeros((BM,), dtype=tl.float32)

    if is_global:
        n_whole = 0 if HAS_KEY_MASK else length_k // BN
        for i in range(n_whole):
            row = i * BN + lane_k
            acc, m, l = _attend_rows(
                acc,
                m,
                l,
                q,
                K,
                V,
                KEY_MASK,
                row,
                row < length_k,
                skr,
                svr,
                scale,
                d,
                D,
                False,
                False,
                NEGATE,
                PRECISION,
            )
        for i in tl.range(n_whole, tl.cdiv(length_k, BN), num_stages=1):
            row = i * BN + lane_k
            acc, m, l = _attend_rows(
                acc,
                m,
                l,
                q,
                K,
                V,
                KEY_MASK,
                row,
                row < length_k,
                skr,
                svr,
                scale,
                d,
                D,
                HAS_KEY_MASK,
                True,
                NEGATE,
                PRECISION,
            )
    else:
        n1 = tl.cdiv(K1, KB1)
        n2 = tl.cdiv(K2, KB2)
        p_list = TILES + bh.to(tl.int64) * list_stride + tile_q.to(tl.int64) * n_list
        g_list = tl.where(list_stride > 0, bh, 0) * n_q_tiles + tile_q
        n_tiles = tl.load(N_TILES + g_list)
        if FULL == 0:  # none
            n_full = n_tiles * 0
        elif FULL == 1:  # counted by the plan
            n_full = tl.load(N_FULL + g_list)
        elif FULL == 2:  # all
            n_full = n_tiles
        else:  # all but the very last tile of the grid, which can only be the last entry of an ascending list
            n_full = n_tiles
            if n_tiles > 0:
                n_full = n_tiles - (tl.load(p_list + n_tiles - 1) == tl.cdiv(K0, KB0) * n1 * n2 - 1).to(tl.int32)
        if FULL > 0:
            for i in range(n_full * K_PARTS):
                tile = tl.load(p_list + i // K_PARTS)
                x0, x1, x2, valid = tile_places(tile, i % K_PARTS * BN + lane_k, K0, K1, K2, KB0, KB1, KB2)
                row = k_before + token_at(TABLES, x0, x1, x2, valid, longest, K1, K2, OR0, OR1, OR2)
                k, v = load_pair(
                    K, V, K_BOXES, V_BOXES, b, hk, n_q_heads // group, tile, i % K_PARTS, K1, K2, row, valid, skr, svr,
                    d, KB0, KB1, KB2, D, BLOCK_D, BN, BOXES, K_PARTS * BN != KB0 * KB1 * KB2,
                )  # fmt: skip
                s = logits(q, k, NEGATE, PRECISION)
                if K_PARTS * BN != KB0 * KB1 * KB2:
                    s = tl.where(valid[None, :], s, float("-inf"))
                acc, m, l = _update(acc, m, l, s, v, scale, K_PARTS > 1, PRECISION)

        if HAS_PARTIAL:
            # (BM,) centre and half length of each query's interval along each axis
            if IN0:
                middle0, half0 = query_interval(TABLES, 0, q0, Q0, longest)
            if IN1:
                middle1, half1 = query_interval(TABLES, 1, q1, Q1, longest)
            if IN2:
                middle2, half2 = query_interval(TABLES, 2, q2, Q2, longest)
            # relative to the first query of the tile: small integers, in a type that represents them and their squares
            o0, o1, o2, _ = tile_places(tile_q, 0, Q0, Q1, Q2, QB0, QB1, QB2)
            TYPE: tl.constexpr = tl.float64 if COST == 2 else tl.float32
            y0, y1, y2 = (q0 - o0).to(TYPE), (q1 - o1).to(TYPE), (q2 - o2).to(TYPE)
            for i in range(n_full * K_PARTS, n_tiles * K_PARTS):
                tile = tl.load(p_list + i // K_PARTS)
                part = i % K_PARTS * BN + lane_k
                k0, k1, k2, valid = tile_places(tile, part, K0, K1, K2, KB0, KB1, KB2)
                row = k_before + token_at(TABLES, k0, k1, k2, valid, longest, K1, K2, OR0, OR1, OR2)
                if HAS_KEY_MASK:
                    valid = valid & (tl.load(KEY_MASK + row, mask=valid, other=0) != 0)
                k, v = load_pair(
                    K, V, K_BOXES, V_BOXES, b, hk, n_q_heads // group, tile, i % K_PARTS, K1, K2, row, valid, skr, svr,
                    d, KB0, KB1, KB2, D, BLOCK_D, BN, BOXES, True,
                )  # fmt: skip
                s = logits(q, k, NEGATE, PRECISION)
                s += tl.where(valid, 0.0, float("-inf"))[None, :]
                if IN0:
                    s = tl.where(in_interval(k0, middle0, half0, False), s, HIDDEN)
                if IN1:
                    s = tl.where(in_interval(k1, middle1, half1, False), s, HIDDEN)
                if IN2:
                    s = tl.where(in_interval(k2, middle2, half2, False), s, HIDDEN)
                if BALL0 or BALL1 or BALL2:
                    x0, x1, x2 = (k0 - o0).to(TYPE), (k1 - o1).to(TYPE), (k2 - o2).to(TYPE)
                    s = tl.where(
                        in_ball(x0, x1, x2, y0, y1, y2, w0, w1, w2, limit, BALL0, BALL1, BALL2, COST), s, HIDDEN
                    )
                acc, m, l = _update(acc, m, l, s, v, scale, True, PRECISION)

        if HAS_GLOBAL_KEYS:
            n_global = length_k - n_grid_k
            n_whole = 0 if HAS_KEY_MASK else n_global // BN
            for i in range(n_whole):
                row = i * BN + lane_k
                row = tl.where(row < k_before, row, row + n_grid_k)
                acc, m, l = _attend_rows(
                    acc, m, l, q, K, V, KEY_MASK, row, row >= 0, skr, svr, scale, d, D, False, False, NEGATE, PRECISION
                )
            for i in tl.range(n_whole, tl.cdiv(n_global, BN), num_stages=1):
                row = i * BN + lane_k
                valid = row < n_global
                row = tl.where(row < k_before, row, row + n_grid_k)
                acc, m, l = _attend_rows(
                    acc,
                    m,
                    l,
                    q,
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
                    True,
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
                acc, m, l = _attend_rows(
                    acc, m, l, q, POOLED_K, POOLED_V, POOLED_MASK, row, row < n_pooled, spr, spr, scale, d, D,
                    HAS_POOLED_MASK, True, NEGATE, PRECISION,
                )  # fmt: skip

    o = acc / tl.where(l > 0, l, 1.0)[:, None]
    if STATE_MODE > 0 or HAS_BIAS:  # noqa: SIM102
        if not is_global:
            linear = tl.zeros((BM, BLOCK_D), dtype=tl.float32)
            if STATE_MODE > 0:
                linear += tl.load(p_o, mask=m_o, other=0.0).to(tl.float32)
            if HAS_BIAS:
                linear += tl.load(BIAS + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            o += tl.where(l > 0, 1.0, 0.0)[:, None] * linear
    tl.store(p_o, o.to(OUT.dtype.element_ty), mask=m_o)
    if HAS_LSE:
        tl.store(LSE + bh.to(tl.int64) * length_q + row_q, (m + tl.log2(l)) * LN2, mask=valid_q)
