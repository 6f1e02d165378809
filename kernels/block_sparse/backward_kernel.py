# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of ``block_sparse/backward.py``.

With S = scale q kᵀ, P = exp(S - lse) and Δ = Σ dO O over the head dim: dV = Pᵀ dO, dS = P (dO vᵀ - Δ),
dQ = scale dS k, dK = scale dSᵀ q. One kernel loops over the keys of each query tile, the other over the queries of
each key tile; each program writes its own rows, so the order of summation is fixed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention_kernel import (
    add_dkv,
    add_dq,
    attended,
    global_row_of,
    head_of,
    item_of,
    load_lse_delta,
    load_queries,
    load_rows,
    load_two,
    logits,
    weights,
)
from ..tiling_kernel import grid_size, tile_corner, tile_count
from ..windows.visible_kernel import query_intervals, tile_rows, visible
from .forward_kernel import list_of, load_listed, load_pair, query_rows

__all__ = ["block_sparse_bwd_dkv_kernel", "block_sparse_bwd_dq_kernel", "preprocess_bwd_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)
BLIND = tl.constexpr(float("inf"))  # log-sum-exp of a row without a visible key: its weights are then 0


@triton.jit
def preprocess_bwd_kernel(
    d_out, out, p_lse, p_linear_delta, p_bias, p_lse_delta, p_d_bias, n_heads, length, before, n_grid,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Preprocess kernel: per row the log-sum-exp in units of log2, and Δ less p_linear_delta and, on the grid, less the
    part of the bias. The partial gradients of the bias go to p_d_bias."""
    n_tiles = tl.cdiv(length, BLOCK_M)
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, h = bh // n_heads, bh % n_heads
    row = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    # (BLOCK_M, BLOCK_D)
    b_do = load_rows(head_of(d_out, b, h), row, row < length, d_out.row, d, D, True).to(tl.float32)
    b_o = load_rows(head_of(out, b, h), row, row < length, out.row, d, D, True).to(tl.float32)
    if p_bias is not None:
        on_grid = ((row >= before) & (row < before + n_grid))[:, None]
        b_o -= tl.where(on_grid, tl.load(p_bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :], 0.0)
        tl.store(p_d_bias + tl.program_id(0) * D + d, tl.sum(tl.where(on_grid, b_do, 0.0), 0), mask=d < D)
    delta = tl.sum(b_do * b_o, 1)
    if p_linear_delta is not None:
        delta -= tl.load(p_linear_delta + bh * length + row, mask=row < length, other=0.0)
    lse = tl.load(p_lse + bh * length + row, mask=row < length, other=0.0)
    p_row = p_lse_delta + (bh * length + row) * 2
    tl.store(p_row, tl.where(lse == -float("inf"), BLIND, lse * LOG2E), mask=row < length)
    tl.store(p_row + 1, delta, mask=row < length)


@triton.jit
def _add_dq(dq, held, b_k, b_v, m_visible, scale, MASKED: tl.constexpr, S: tl.constexpr):
    """Add dS k of a tile of keys; held: what `load_queries` returned. m_visible:
    (queries, keys), or (1, keys)."""
    b_q, b_do, lse, delta = held
    b_p = weights(logits(b_q, b_k, S) * scale - lse[:, None])
    if MASKED:
        b_p = tl.where(m_visible, b_p, 0.0)
    return add_dq(dq, b_p, b_do, delta, b_k, b_v, S)


@triton.jit
def _add_dq_rows(dq, held, key, value, b, h, row, valid, scale, S: tl.constexpr):
    """Add dS k of keys at the given rows, visible to all queries if valid."""
    b_k, b_v = load_two(key, value, b, h, row, valid, True, S)
    return _add_dq(dq, held, b_k, b_v, valid[None, :], scale, True, S)


@triton.jit
def _add_dq_listed(
    dq, held, q, key, value, k_boxes, v_boxes, key_mask, lists, bh, tile_q, b, h, n_heads, queries, keys, window, scale,
    S: tl.constexpr,
):  # fmt: skip
    """Add dS k of the keys in the list of a tile of queries at positions q."""
    QB: tl.constexpr = S.QB
    p_list, n_full, n_listed = list_of(lists, bh, tile_q, tile_count(queries, QB))
    if not S.PARTIAL:
        n_full = n_listed
    for i in range(n_full * S.K_PARTS):
        b_k, b_v, _k, valid = load_listed(
            key, value, k_boxes, v_boxes, key_mask, p_list, i, b, h, n_heads, keys, window, not S.WHOLE, S
        )
        dq = _add_dq(dq, held, b_k, b_v, valid[None, :], scale, not S.WHOLE, S)
    if S.PARTIAL:
        intervals = query_intervals(window, q, queries, S)
        origin = tile_corner(tile_q, queries, QB)
        for i in range(n_full * S.K_PARTS, n_listed * S.K_PARTS):
            b_k, b_v, k, valid = load_listed(
                key, value, k_boxes, v_boxes, key_mask, p_list, i, b, h, n_heads, keys, window, True, S
            )
            m_visible = visible(q, k, valid, intervals, origin, window, False, S)
            dq = _add_dq(dq, held, b_k, b_v, m_visible, scale, True, S)
    return dq


@triton.jit
def block_sparse_bwd_dq_kernel(
    query, key, value, d_out, p_lse_delta, d_query, key_mask, lists, window, pooled_key, pooled_value, pooled_mask,
    n_pooled, k_boxes, v_boxes, queries, keys, n_groups, n_heads, group, scale, grad_scale, S: tl.constexpr,
):  # fmt: skip
    """Gradient of BM queries of one head, in the order of the forward kernel. With ADD, that of grid queries is added
    to the content of d_query."""
    QB: tl.constexpr = S.QB
    n_global = tl.cdiv(queries.length - grid_size(queries), S.BM)
    n_items = tile_count(queries, QB) * S.Q_PARTS
    is_global, bh, item = item_of(n_global, n_items, n_groups, S.GLOBAL_QUERIES)
    b, h = bh // n_heads, bh % n_heads
    hk, n_kv_heads = h // group, n_heads // group
    lane, d = tl.arange(0, S.BN), tl.arange(0, S.BLOCK_D)
    q, valid_q, row_q = query_rows(item, is_global, queries, window, S)
    # (BM, BLOCK_D)
    p_rows = p_lse_delta + bh.to(tl.int64) * queries.length * 2
    held = load_queries(query, d_out, p_rows, b, h, row_q, valid_q, S)
    dq = tl.full((S.BM, S.BLOCK_D), 0.0, tl.float32)
    if is_global:
        for i in range(tl.cdiv(keys.length, S.BN)):
            row = i * S.BN + lane
            valid = attended(key_mask, b, row, row < keys.length)
            dq = _add_dq_rows(dq, held, key, value, b, hk, row, valid, scale, S)
    else:
        dq = _add_dq_listed(
            dq, held, q, key, value, k_boxes, v_boxes, key_mask, lists, bh, item // S.Q_PARTS, b, hk, n_kv_heads,
            queries, keys, window, scale, S,
        )  # fmt: skip
        if S.GLOBAL_KEYS:
            n_global = keys.length - grid_size(keys)
            for i in range(tl.cdiv(n_global, S.BN)):
                row = global_row_of(i * S.BN + lane, keys)
                valid = attended(key_mask, b, row, i * S.BN + lane < n_global)
                dq = _add_dq_rows(dq, held, key, value, b, hk, row, valid, scale, S)
        if pooled_key.data is not None:
            for i in range(tl.cdiv(n_pooled, S.BN)):
                row = i * S.BN + lane
                valid = attended(pooled_mask, b, row, row < n_pooled)
                dq = _add_dq_rows(dq, held, pooled_key, pooled_value, b, hk, row, valid, scale, S)
    dq *= grad_scale
    p_dq = head_of(d_query, b, h) + row_q.to(tl.int64)[:, None] * d_query.row + d[None, :]
    m_dq = valid_q[:, None] & (d < S.D)[None, :]
    if S.ADD:  # noqa: SIM102
        if not is_global:
            dq += tl.load(p_dq, mask=m_dq, other=0.0).to(tl.float32)
    tl.store(p_dq, dq.to(d_query.data.dtype.element_ty), mask=m_dq)


@triton.jit
def _add_dkv(carry, b_k, b_v, b_q, b_do, p_lse_delta, row, valid, m_visible, scale, MASKED: tl.constexpr,
             S: tl.constexpr):  # fmt: skip
    """Add dSᵀ q and Pᵀ dO of queries at the given rows. m_visible: (keys, queries)."""
    dk, dv = carry
    lse, delta = load_lse_delta(p_lse_delta, row, valid)
    b_p = weights(logits(b_k, b_q, S) * scale - lse[None, :])
    if MASKED:
        b_p = tl.where(m_visible, b_p, 0.0)
    return add_dkv(dk, dv, b_p, b_do, delta, b_q, b_v, S)


@triton.jit
def _add_dkv_rows(carry, b_k, b_v, query, d_out, p_lse_delta, b, h, row, valid, scale, S: tl.constexpr):
    """Add dSᵀ q and Pᵀ dO of queries at the given rows, which attend to all these keys if valid."""
    b_q, b_do = load_two(query, d_out, b, h, row, valid, True, S)
    return _add_dkv(carry, b_k, b_v, b_q, b_do, p_lse_delta, row, valid, valid[None, :], scale, False, S)


@triton.jit
def _add_dkv_listed(
    carry, b_k, b_v, k, query, d_out, q_boxes, do_boxes, p_lse_delta, lists, tile_k, b, h, n_heads, queries, keys,
    window, scale, S: tl.constexpr,
):  # fmt: skip
    """Add dSᵀ q and Pᵀ dO of the queries in the list of a tile of keys at positions k."""
    QB: tl.constexpr = S.QB
    KB: tl.constexpr = S.KB
    p_list, n_full, n_listed = list_of(lists, b * n_heads + h, tile_k, tile_count(keys, KB))
    if not S.PARTIAL:
        n_full = n_listed
    for i in range(n_full * S.Q_PARTS):
        tile, part = tl.load(p_list + i // S.Q_PARTS), i % S.Q_PARTS
        _q, valid, row = tile_rows(tile, part * S.BM + tl.arange(0, S.BM), queries, window, QB, S)
        b_q, b_do = load_pair(
            query, d_out, q_boxes, do_boxes, b, h, n_heads, tile, part, valid, row, queries, QB, S.BM, True, S
        )
        carry = _add_dkv(carry, b_k, b_v, b_q, b_do, p_lse_delta, row, valid, valid[None, :], scale, False, S)
    if S.PARTIAL:
        origin = tile_corner(tile_k, keys, KB)
        for i in range(n_full * S.Q_PARTS, n_listed * S.Q_PARTS):
            tile, part = tl.load(p_list + i // S.Q_PARTS), i % S.Q_PARTS
            q, valid, row = tile_rows(tile, part * S.BM + tl.arange(0, S.BM), queries, window, QB, S)
            m_visible = visible(k, q, valid, query_intervals(window, q, queries, S), origin, window, True, S)
            b_q, b_do = load_pair(
                query, d_out, q_boxes, do_boxes, b, h, n_heads, tile, part, valid, row, queries, QB, S.BM, True, S
            )
            carry = _add_dkv(carry, b_k, b_v, b_q, b_do, p_lse_delta, row, valid, m_visible, scale, True, S)
    return carry


@triton.jit
def _key_rows(item, is_first, is_pooled, n_global, n_pooled, keys, window, S: tl.constexpr):
    """Positions (BN,) along each axis of the keys of an item, whether they are valid, and their rows: of grid keys and
    global keys in the sequence, of pooled keys among these."""
    KB: tl.constexpr = S.KB
    lane = tl.arange(0, S.BN)
    k, valid, row = tile_rows(item // S.K_PARTS, item % S.K_PARTS * S.BN + lane, keys, window, KB, S)
    global_row = global_row_of(item * S.BN + lane, keys)
    row = tl.where(is_first, global_row, row)
    valid = tl.where(is_first, global_row < keys.length, valid)
    pooled_row = (item - n_global) * S.BN + lane
    row = tl.where(is_pooled, pooled_row, row)
    return k, tl.where(is_pooled, pooled_row < n_pooled, valid), row


@triton.jit
def block_sparse_bwd_dkv_kernel(
    query, key, value, d_out, p_lse_delta, d_key, d_value, key_mask, lists, window, pooled_key, pooled_value,
    pooled_mask, n_pooled, d_pooled_key, d_pooled_value, q_boxes, do_boxes, queries, keys, n_groups, n_heads, group,
    scale, grad_scale, S: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys and values of one head. Global keys come first, then the pooled ones, because they take
    longest. With ADD, those of grid keys are added to the content of d_key and d_value."""
    KB: tl.constexpr = S.KB
    n_grid_q = grid_size(queries)
    n_global = tl.cdiv(keys.length - grid_size(keys), S.BN)
    n_pooled_tiles = tl.cdiv(n_pooled, S.BN)
    is_first, bh, item = item_of(n_global + n_pooled_tiles, tile_count(keys, KB) * S.K_PARTS, n_groups, True)
    is_pooled = is_first & (item >= n_global)
    n_kv_heads = n_heads // group
    b, hk = (bh // n_kv_heads).to(tl.int64), (bh % n_kv_heads).to(tl.int64)
    lane, d = tl.arange(0, S.BM), tl.arange(0, S.BLOCK_D)
    k, valid_k, row_k = _key_rows(item, is_first, is_pooled, n_global, n_pooled, keys, window, S)
    p_k, p_v = head_of(key, b, hk), head_of(value, b, hk)
    p_dk, p_dv = head_of(d_key, b, hk), head_of(d_value, b, hk)
    stride_k, stride_v, stride_d = key.row, value.row, d_key.row
    seen = valid_k
    if key_mask.data is not None:
        of_sequence = tl.where(is_pooled, row_k < 0, valid_k)
        seen = tl.where(is_pooled, valid_k, attended(key_mask, b, row_k, of_sequence))
    if pooled_key.data is not None:
        stride_k, stride_v = (
            tl.where(is_pooled, pooled_key.row, key.row),
            tl.where(is_pooled, pooled_value.row, value.row),
        )
        stride_d = tl.where(is_pooled, d_pooled_key.row, d_key.row)
        if is_pooled:
            p_k, p_v = head_of(pooled_key, b, hk), head_of(pooled_value, b, hk)
            p_dk, p_dv = head_of(d_pooled_key, b, hk), head_of(d_pooled_value, b, hk)
            seen = attended(pooled_mask, b, row_k, seen)
    # (BN, BLOCK_D)
    b_k = load_rows(p_k, row_k, seen, stride_k, d, S.D, True)
    b_v = load_rows(p_v, row_k, seen, stride_v, d, S.D, True)
    dk = tl.full((S.BN, S.BLOCK_D), 0.0, tl.float32)
    carry = (dk, tl.full((S.BN, S.BLOCK_D), 0.0, tl.float32))
    for i_head in range(group):
        h = hk * group + i_head
        p_rows = p_lse_delta + (b * n_heads + h) * queries.length * 2
        # queries that attend to all of these keys: the global ones, all, or those of the grid
        first = tl.where(is_pooled, queries.before, 0)
        n_rows = tl.where(is_first, queries.length, queries.length - n_grid_q)
        n_rows = tl.where(is_pooled, n_grid_q, n_rows)
        if S.GLOBAL_QUERIES or is_first:
            for i in range(tl.cdiv(n_rows, S.BM)):
                row = first + i * S.BM + lane
                row = tl.where(is_first, row, global_row_of(row, queries))
                carry = _add_dkv_rows(
                    carry, b_k, b_v, query, d_out, p_rows, b, h, row, i * S.BM + lane < n_rows, scale, S
                )
        if is_first == 0:
            carry = _add_dkv_listed(
                carry, b_k, b_v, k, query, d_out, q_boxes, do_boxes, p_rows, lists, item // S.K_PARTS, b, h, n_heads,
                queries, keys, window, scale, S,
            )  # fmt: skip
    dk, dv = carry
    # masked keys were loaded as zeros: their gradients are 0
    dk, dv = tl.where(seen[:, None], dk * grad_scale, 0.0), tl.where(seen[:, None], dv, 0.0)
    offset = row_k.to(tl.int64)[:, None] * stride_d + d[None, :]
    m_d = valid_k[:, None] & (d < S.D)[None, :]
    if S.ADD:  # noqa: SIM102
        if is_first == 0:
            dk += tl.load(p_dk + offset, mask=m_d, other=0.0).to(tl.float32)
            dv += tl.load(p_dv + offset, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_dk + offset, dk.to(d_key.data.dtype.element_ty), mask=m_d)
    tl.store(p_dv + offset, dv.to(d_value.data.dtype.element_ty), mask=m_d)
