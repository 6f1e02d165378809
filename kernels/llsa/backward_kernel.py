# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of ``llsa_bwd_triton.py``; the formulas are those of ``block_sparse_bwd_triton_kernel.py``, with weights
added to the logits of pooled tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.backward_kernel import load_lse_delta, weights
from ..block_sparse.forward_kernel import load_rows
from .forward_kernel import kept_rows, query_rows

__all__ = ["llsa_coarse_bwd_dq_kernel", "llsa_dkv_kernel", "llsa_fine_bwd_dq_kernel"]


@triton.jit
def _add_dq(dq, q, do, lse, delta, k, v, bias, scale, PRECISION: tl.constexpr):
    """Add dS k of a tile of keys; bias (BN,) is -inf for masked keys."""
    p = weights(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :] - lse[:, None])
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def llsa_coarse_bwd_dq_kernel(
    Q, K, V, DO, LSE_DELTA, DQ, KEY_MASK, POOLED_K, POOLED_V, WEIGHT, INDICES, BLOCKS, NODES, sqb, sqh, sqr, skb, skh,
    skr, svb, svh, svr, sgb, sgh, sgr, sdb, sdh, sdr, smb, swb, n_heads, length, before, n_grid, n_pooled, first_top,
    n_indices, n_nodes, n_slots, n_groups, n_global_tiles, n_items, scale, grad_scale, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, HAS_NODES: tl.constexpr,
    HAS_POOLED: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of queries from pooled and global keys, in the tiles of the forward's coarse kernel; complete for global
    queries."""
    pid = tl.program_id(0)
    if HAS_GLOBAL:
        is_global = pid < n_global_tiles * n_groups
        local = tl.where(is_global, pid, pid - n_global_tiles * n_groups)
        per_head = tl.where(is_global, n_global_tiles, n_items)
    else:
        is_global: tl.constexpr = False  # type: ignore[no-redef]
        local = pid
        per_head = n_items
    g = (local // per_head).to(tl.int64)
    item = local % per_head
    b, h = g // n_heads, g % n_heads
    K += b * skb + h * skh
    V += b * svb + h * svh
    if HAS_KEY_MASK:
        KEY_MASK += b * smb
    d = tl.arange(0, BLOCK_D)
    lane_k = tl.arange(0, BN)
    row_q, valid_q = query_rows(
        BLOCKS, NODES, item, is_global, before, n_grid, length, n_slots, BM, BLOCK, HAS_NODES, HAS_GLOBAL
    )
    q = load_rows(Q + b * sqb + h * sqh, row_q, valid_q, sqr, d, D, True)
    do = load_rows(DO + b * sgb + h * sgh, row_q, valid_q, sgr, d, D, True).to(q.dtype)
    lse, delta = load_lse_delta(LSE_DELTA + g * length * 2, row_q, valid_q)
    dq = tl.zeros((BM, BLOCK_D), dtype=tl.float32)
    if is_global == 0:  # noqa: SIM102
        if HAS_POOLED:
            POOLED_K += g * n_pooled * D
            POOLED_V += g * n_pooled * D
            WEIGHT += b * swb
            if HAS_NODES:
                p_indices = INDICES + (g * n_nodes + item // tl.cdiv(n_slots, BM)) * n_indices
                for start in range(0, n_indices, BN):
                    row = tl.load(p_indices + start + lane_k, mask=start + lane_k < n_indices, other=n_pooled - 1)
                    k = load_rows(POOLED_K, row, row >= 0, D, d, D, False)
                    v = load_rows(POOLED_V, row, row >= 0, D, d, D, False)
                    dq = _add_dq(dq, q, do, lse, delta, k, v, tl.load(WEIGHT + row), scale, PRECISION)
            for start in range(first_top, n_pooled - 1, BN):
                row = tl.minimum(start + lane_k, n_pooled - 1)
                k = load_rows(POOLED_K, row, row >= 0, D, d, D, False)
                v = load_rows(POOLED_V, row, row >= 0, D, d, D, False)
                dq = _add_dq(dq, q, do, lse, delta, k, v, tl.load(WEIGHT + row), scale, PRECISION)
    if HAS_GLOBAL:
        # global queries attend to all keys, grid queries to the global ones
        n_visible = tl.where(is_global, length, length - n_grid)
        for start in range(0, n_visible, BN):
            row = start + lane_k
            valid = row < n_visible
            row = tl.where(is_global | (row < before), row, row + n_grid)
            if HAS_KEY_MASK:
                valid = valid & (tl.load(KEY_MASK + row, mask=valid, other=0) != 0)
            k = load_rows(K, row, valid, skr, d, D, True)
            v = load_rows(V, row, valid, svr, d, D, True)
            bias = tl.where(valid, 0.0, float("-inf"))
            dq = _add_dq(dq, q, do, lse, delta, k, v, bias, scale, PRECISION)
    p_dq = DQ + b * sdb + h * sdh + row_q.to(tl.int64)[:, None] * sdr + d[None, :]
    tl.store(p_dq, (dq * grad_scale).to(DQ.dtype.element_ty), mask=valid_q[:, None] & (d < D)[None, :])


@triton.jit
def llsa_fine_bwd_dq_kernel(
    Q, K, V, DO, LSE_DELTA, DQ, KEY_MASK, KEPT, BLOCKS, sqb, sqh, sqr, skb, skh, skr, svb, svh, svr, sgb, sgh, sgr, sdb,
    sdh, sdr, smb, n_heads, n_blocks, length, before, scale, grad_scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, N_KEPT: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    HAS_COARSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of BM queries of a block from the tokens of its kept blocks. HAS_COARSE: add the coarse kernel's result
    in DQ."""
    PARTS: tl.constexpr = (BLOCK + BM - 1) // BM
    part = tl.program_id(0) % PARTS
    i_q = tl.program_id(0) // PARTS % n_blocks
    g = (tl.program_id(0) // (PARTS * n_blocks)).to(tl.int64)
    b, h = g // n_heads, g % n_heads
    K += b * skb + h * skh
    V += b * svb + h * svh
    if HAS_KEY_MASK:
        KEY_MASK += b * smb
    d = tl.arange(0, BLOCK_D)
    lane_k = tl.arange(0, BN)
    slot = part * BM + tl.arange(0, BM)
    row_q = tl.load(BLOCKS + i_q.to(tl.int64) * BLOCK + slot, mask=slot < BLOCK, other=-1)
    valid_q = row_q >= 0
    row_q += before
    q = load_rows(Q + b * sqb + h * sqh, row_q, valid_q, sqr, d, D, True)
    do = load_rows(DO + b * sgb + h * sgh, row_q, valid_q, sgr, d, D, True).to(q.dtype)
    lse, delta = load_lse_delta(LSE_DELTA + g * length * 2, row_q, valid_q)
    dq = tl.zeros((BM, BLOCK_D), dtype=tl.float32)
    p_kept = KEPT + (g * n_blocks + i_q) * N_KEPT
    for start in range(0, N_KEPT * BLOCK, BN):
        row, valid = kept_rows(p_kept, BLOCKS, KEY_MASK, start + lane_k, before, BLOCK, N_KEPT, True, HAS_KEY_MASK)
        k = load_rows(K, row, valid, skr, d, D, True)
        v = load_rows(V, row, valid, svr, d, D, True)
        dq = _add_dq(dq, q, do, lse, delta, k, v, tl.where(valid, 0.0, float("-inf")), scale, PRECISION)
    dq *= grad_scale
    p_dq = DQ + b * sdb + h * sdh + row_q.to(tl.int64)[:, None] * sdr + d[None, :]
    m_dq = valid_q[:, None] & (d < D)[None, :]
    if HAS_COARSE:
        dq += tl.load(p_dq, mask=m_dq, other=0.0).to(tl.float32)
    tl.store(p_dq, dq.to(DQ.dtype.element_ty), mask=m_dq)


@triton.jit
def _add_dkv(
    dk, dv, k, v, bias, Q, DO, LSE_DELTA, row, valid, sqr, sgr, scale, d, D: tl.constexpr, PRECISION: tl.constexpr
):
    """Add dSᵀ q and Pᵀ dO (BK, BLOCK_D) of queries at the given rows; keys are the rows of all products."""
    q = load_rows(Q, row, valid, sqr, d, D, True)
    do = load_rows(DO, row, valid, sgr, d, D, True).to(q.dtype)
    lse, delta = load_lse_delta(LSE_DELTA, row, valid)
    p = weights(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + bias[:, None] - lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def llsa_dkv_kernel(
    Q, K, V, DO, LSE_DELTA, KEY_MASK, WEIGHT, LISTS, ENDS, TABLE, BLOCKS, NODES, ABOVE_K, ABOVE_V, DK, DV,
    sqb, sqh, sqr, skb, skh, skr, svb, svh, svr, sgb, sgh, sgr, sds, sdb, sdh, sdr, smb, swb, list_stride,
    n_heads, n_groups, length, n_tiles, n_keys, first_key, key_cut, key_skip, n_rows, row_cut, row_skip,
    split_rows, q_before, scale, grad_scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, BY_TABLE: tl.constexpr, HAS_LISTS: tl.constexpr, HAS_NODES: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_ABOVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of BK keys of one head.

    Keys: with BY_TABLE those at a row of TABLE, of BLOCK entries; otherwise an interval of n_keys rows. Queries: with
    HAS_LISTS those of the blocks (HAS_NODES: of the level-2 tokens) that LISTS holds for the tile; with HAS_ROWS an
    interval of n_rows rows, split_rows per program. Intervals skip key_skip or row_skip rows from the cut on.
    HAS_ABOVE: add the gradient through the pooled tokens above. Gradients of an interval are stored contiguously.
    """
    PARTS: tl.constexpr = (BLOCK + BK - 1) // BK if BY_TABLE else 1
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS % n_tiles
    rest = tl.program_id(0) // (PARTS * n_tiles)
    g = (rest % n_groups).to(tl.int64)
    split = rest // n_groups
    b, h = g // n_heads, g % n_heads
    d = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BN)
    if BY_TABLE:
        slot = part * BK + tl.arange(0, BK)
        row_k = tl.load(TABLE + tile.to(tl.int64) * BLOCK + slot, mask=slot < BLOCK, other=-1).to(tl.int32)
        valid_k = row_k >= 0
        row_k += first_key
        row_o = row_k
    else:
        row_o = tile * BK + tl.arange(0, BK)
        valid_k = row_o < n_keys
        row_k = tl.where(row_o < key_cut, row_o, row_o + key_skip)
    visible = valid_k
    if HAS_KEY_MASK:
        visible = visible & (tl.load(KEY_MASK + b * smb + row_k, mask=valid_k, other=0) != 0)
    bias = tl.where(visible, 0.0, float("-inf"))
    if HAS_WEIGHT:
        bias = tl.load(WEIGHT + b * swb + row_k, mask=valid_k, other=float("-inf"))
    k = load_rows(K + b * skb + h * skh, row_k, visible, skr, d, D, True)
    v = load_rows(V + b * svb + h * svh, row_k, visible, svr, d, D, True)
    dk = tl.zeros((BK, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BK, BLOCK_D), dtype=tl.float32)
    Q += b * sqb + h * sqh
    DO += b * sgb + h * sgh
    LSE_DELTA += g * length * 2
    if HAS_LISTS:
        PLACES: tl.constexpr = BLOCK * BLOCK if HAS_NODES else BLOCK
        begin = tl.load(ENDS + g * (n_tiles + 1) + tile)
        n_listed = tl.load(ENDS + g * (n_tiles + 1) + tile + 1) - begin
        p_list = LISTS + g * list_stride + begin
        for start in range(0, n_listed * PLACES, BN):
            place = start + lane
            block = tl.load(p_list + place // PLACES, mask=place < n_listed * PLACES, other=-1)
            if HAS_NODES:
                p_block = NODES + block.to(tl.int64) * BLOCK + place % PLACES // BLOCK
                block = tl.load(p_block, mask=block >= 0, other=-1).to(tl.int32)
            row = tl.load(BLOCKS + block.to(tl.int64) * BLOCK + place % BLOCK, mask=block >= 0, other=-1)
            dk, dv = _add_dkv(
                dk, dv, k, v, bias, Q, DO, LSE_DELTA, row + q_before, row >= 0, sqr, sgr, scale, d, D, PRECISION
            )
    if HAS_ROWS:
        for start in range(split * split_rows, tl.minimum((split + 1) * split_rows, n_rows), BN):
            row = start + lane
            valid = row < tl.minimum((split + 1) * split_rows, n_rows)
            row = tl.where(row < row_cut, row, row + row_skip)
            dk, dv = _add_dkv(
                dk, dv, k, v, bias, Q, DO, LSE_DELTA, row, valid, sqr, sgr, scale, d, D, PRECISION
            )  # fmt: skip
    dk *= grad_scale
    if HAS_ABOVE:
        above = (g * n_tiles + tile) * D + d
        dk += tl.load(ABOVE_K + above, mask=d < D, other=0.0)[None, :]
        dv += tl.load(ABOVE_V + above, mask=d < D, other=0.0)[None, :]
    dk = tl.where(visible[:, None], dk, 0.0)  # masked keys have no gradient
    dv = tl.where(visible[:, None], dv, 0.0)
    offset = split.to(tl.int64) * sds + b * sdb + h * sdh + row_o.to(tl.int64)[:, None] * sdr + d[None, :]
    m_o = valid_k[:, None] & (d < D)[None, :]
    tl.store(DK + offset, dk.to(DK.dtype.element_ty), mask=m_o)
    tl.store(DV + offset, dv.to(DV.dtype.element_ty), mask=m_o)
