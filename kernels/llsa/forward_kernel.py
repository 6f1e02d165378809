# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of ``llsa_triton.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.forward_kernel import load_rows

__all__ = ["kept_rows", "llsa_coarse_fwd_kernel", "llsa_fine_fwd_kernel", "query_rows"]

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _update(acc, m, l, q, k, v, bias, scale, PRECISION: tl.constexpr):
    """One step of the online softmax over keys (BN, BLOCK_D); logits are in units of log2, bias (BN,) is -inf for
    masked keys."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :]
    m_new = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no visible key so far
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, l


@triton.jit
def _pooled(
    acc, m, l, q, K, V, WEIGHT, row, weight, scale, d, D: tl.constexpr, BN: tl.constexpr, BY_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to pooled keys at the given rows, with a weight added to their logits: one per row, or the same for
    all."""
    bias = tl.load(WEIGHT + row) if BY_ROW else tl.zeros((BN,), tl.float32) + weight
    k = load_rows(K, row, row >= 0, D, d, D, False)
    v = load_rows(V, row, row >= 0, D, d, D, False)
    return _update(acc, m, l, q, k, v, bias, scale, PRECISION)


@triton.jit
def _tokens(
    acc, m, l, q, K, V, KEY_MASK, row, valid, skr, svr, scale, d, D: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to keys of the sequence at the given rows, if valid and not masked."""
    if HAS_KEY_MASK:
        valid = valid & (tl.load(KEY_MASK + row, mask=valid, other=0) != 0)
    k = load_rows(K, row, valid, skr, d, D, True)
    v = load_rows(V, row, valid, svr, d, D, True)
    return _update(acc, m, l, q, k, v, tl.where(valid, 0.0, float("-inf")), scale, PRECISION)


@triton.jit
def query_rows(
    BLOCKS, NODES, item, is_global, before, n_grid, length, n_slots, BM: tl.constexpr, BLOCK: tl.constexpr,
    HAS_NODES: tl.constexpr, HAS_GLOBAL: tl.constexpr,
):  # fmt: skip
    """Row in the sequence of each query of a tile, (BM,), and whether it is valid."""
    parts = tl.cdiv(n_slots, BM)
    on_grid = tl.where(is_global, 0, item)  # there may be more tiles of global tokens than of the grid
    slot = on_grid % parts * BM + tl.arange(0, BM)
    valid = slot < n_slots
    block = slot // BLOCK
    if HAS_NODES:
        p_block = NODES + (on_grid // parts).to(tl.int64) * BLOCK + block
        block = tl.load(p_block, mask=valid, other=-1).to(tl.int32)
        valid = block >= 0
    place = tl.load(BLOCKS + block.to(tl.int64) * BLOCK + slot % BLOCK, mask=valid, other=-1).to(tl.int32)
    valid = place >= 0
    row = place + before
    if HAS_GLOBAL:
        off_grid = item * BM + tl.arange(0, BM)
        global_row = tl.where(off_grid < before, off_grid, off_grid + n_grid)
        row = tl.where(is_global, global_row, row)
        valid = tl.where(is_global, global_row < length, valid)
    return row, valid


@triton.jit
def kept_rows(
    p_kept, BLOCKS, KEY_MASK, place, before, BLOCK: tl.constexpr, N_KEPT: tl.constexpr, MASKED: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
):  # fmt: skip
    """Row in the sequence of the keys at the given positions in the concatenated kept blocks, and whether they are
    valid."""
    if MASKED:
        block = tl.load(p_kept + place // BLOCK, mask=place < N_KEPT * BLOCK, other=-1)
        row = tl.load(BLOCKS + block.to(tl.int64) * BLOCK + place % BLOCK, mask=block >= 0, other=-1)
        valid = row >= 0
        row += before
        if HAS_KEY_MASK:
            valid = valid & (tl.load(KEY_MASK + row, mask=valid, other=0) != 0)
    else:
        block = tl.load(p_kept + place // BLOCK)
        row = tl.load(BLOCKS + block.to(tl.int64) * BLOCK + place % BLOCK) + before
        valid = row >= 0
    return row, valid


@triton.jit
def llsa_coarse_fwd_kernel(
    Q, K, V, OUT, LSE, KEY_MASK, POOLED_K, POOLED_V, WEIGHT, INDICES, BLOCKS, NODES, sqb, sqh, sqr, skb, skh, skr, svb,
    svh, svr, sob, soh, sor, smb, swb, n_heads, length, before, n_grid, n_pooled, first_top, n_indices, n_nodes,
    n_slots, n_groups, n_global_tiles, n_items, scale, indices_weight, top_weight, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, HAS_NODES: tl.constexpr,
    HAS_POOLED: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, INDICES_WHOLE: tl.constexpr,
    TOP_WHOLE: tl.constexpr, INDICES_BY_ROW: tl.constexpr, TOP_BY_ROW: tl.constexpr, ALL_SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Coarse attention of a tile of queries in tree order: the pooled tokens that they all attend to, and the global
    keys. The first programs process global queries with every key. HAS_NODES: there is a second level, and a tile lies
    within the n_slots slots of one level-2 token; otherwise it lies anywhere in the n_slots slots of all blocks. The
    last pooled token is empty: its weight is -inf. INDICES_WHOLE, TOP_WHOLE: no tile is short."""
    pid = tl.program_id(0)
    if HAS_GLOBAL:  # first, because they take longest
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
    q = load_rows(Q + b * sqb + h * sqh, row_q, valid_q, sqr, d, D, not ALL_SLOTS)
    acc = tl.zeros((BM, BLOCK_D), dtype=tl.float32)
    m = tl.full((BM,), float("-inf"), dtype=tl.float32)
    l = tl.zeros((BM,), dtype=tl.float32)

    if is_global:
        for start in range(0, length, BN):
            row = start + lane_k
            acc, m, l = _tokens(
                acc, m, l, q, K, V, KEY_MASK, row, row < length, skr, svr, scale, d, D, HAS_KEY_MASK, PRECISION
            )  # fmt: skip
    else:
        if HAS_POOLED:
            POOLED_K += g * n_pooled * D
            POOLED_V += g * n_pooled * D
            WEIGHT += b * swb
            if HAS_NODES:
                p_indices = INDICES + (g * n_nodes + item // tl.cdiv(n_slots, BM)) * n_indices
                for start in range(0, n_indices, BN):
                    if INDICES_WHOLE:
                        row = tl.load(p_indices + start + lane_k)
                    else:
                        row = tl.load(p_indices + start + lane_k, mask=start + lane_k < n_indices, other=n_pooled - 1)
                    acc, m, l = _pooled(
                        acc,
                        m,
                        l,
                        q,
                        POOLED_K,
                        POOLED_V,
                        WEIGHT,
                        row,
                        indices_weight,
                        scale,
                        d,
                        D,
                        BN,
                        INDICES_BY_ROW,
                        PRECISION,
                    )
            for start in range(first_top, n_pooled - 1, BN):
                row = start + lane_k
                if not TOP_WHOLE:
                    row = tl.minimum(row, n_pooled - 1)
                acc, m, l = _pooled(
                    acc, m, l, q, POOLED_K, POOLED_V, WEIGHT, row, top_weight, scale, d, D, BN, TOP_BY_ROW, PRECISION
                )
        if HAS_GLOBAL:
            n_global = length - n_grid
            for start in tl.range(0, n_global, BN, num_stages=1):
                row = start + lane_k
                valid = row < n_global
                row = tl.where(row < before, row, row + n_grid)
                acc, m, l = _tokens(
                    acc, m, l, q, K, V, KEY_MASK, row, valid, skr, svr, scale, d, D, HAS_KEY_MASK, PRECISION
                )

    tl.debug_barrier()  # keeps the compiler from holding the rows in registers all the time
    row_q, valid_q = query_rows(
        BLOCKS, NODES, item, is_global, before, n_grid, length, n_slots, BM, BLOCK, HAS_NODES, HAS_GLOBAL
    )
    o = acc / tl.where(l > 0, l, 1.0)[:, None]
    p_o = OUT + b * sob + h * soh + row_q.to(tl.int64)[:, None] * sor + d[None, :]
    tl.store(p_o, o.to(OUT.dtype.element_ty), mask=valid_q[:, None] & (d < D)[None, :])
    lse = tl.where(l > 0, (m + tl.log2(tl.where(l > 0, l, 1.0))) * LN2, float("-inf"))
    tl.store(LSE + g * length + row_q, lse, mask=valid_q)


@triton.jit
def llsa_fine_fwd_kernel(
    Q, K, V, OUT, LSE, KEY_MASK, KEPT, BLOCKS, sqb, sqh, sqr, skb, skh, skr, svb, svh, svr, sob, soh, sor, smb,
    n_heads, n_blocks, length, before, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, N_KEPT: tl.constexpr, MASKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    HAS_COARSE: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fine attention of BM queries of a level-1 block over the tokens of its kept blocks. HAS_COARSE: merge with the
    coarse kernel's result in OUT and LSE."""
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

    # (BM,) row of each query in the sequence
    slot = part * BM + tl.arange(0, BM)
    row_q = tl.load(BLOCKS + i_q.to(tl.int64) * BLOCK + slot, mask=slot < BLOCK, other=-1)
    valid_q = row_q >= 0
    row_q += before
    q = load_rows(Q + b * sqb + h * sqh, row_q, valid_q, sqr, d, D, MASKED or BLOCK % BM != 0)
    p_o = OUT + b * sob + h * soh + row_q.to(tl.int64)[:, None] * sor + d[None, :]
    m_o = valid_q[:, None] & (d < D)[None, :]
    if HAS_COARSE:  # prefetched for the merge at the end
        m_coarse = tl.load(LSE + g * length + row_q, mask=valid_q, other=float("-inf")) * LOG2E
        o_coarse = tl.load(p_o, mask=m_o, other=0.0)
    m = tl.full((BM,), float("-inf"), dtype=tl.float32)
    l = tl.zeros((BM,), dtype=tl.float32)
    acc = tl.zeros((BM, BLOCK_D), dtype=tl.float32)

    p_kept = KEPT + (g * n_blocks + i_q) * N_KEPT
    for start in range(0, N_KEPT * BLOCK, BN):
        row, valid = kept_rows(p_kept, BLOCKS, KEY_MASK, start + lane_k, before, BLOCK, N_KEPT, MASKED, HAS_KEY_MASK)
        k = load_rows(K, row, valid, skr, d, D, MASKED)
        v = load_rows(V, row, valid, svr, d, D, MASKED)
        bias = tl.where(valid, 0.0, float("-inf")) if MASKED else tl.zeros((BN,), tl.float32)
        acc, m, l = _update(acc, m, l, q, k, v, bias, scale, PRECISION)

    if HAS_COARSE:
        m_fine = m
        m = tl.maximum(m, m_coarse)
        shift = tl.where(m == float("-inf"), 0.0, m)
        alpha, beta = tl.exp2(m_fine - shift), tl.exp2(m_coarse - shift)
        l = l * alpha + beta
        acc = acc * alpha[:, None] + o_coarse.to(tl.float32) * beta[:, None]
    o = acc / tl.where(l > 0, l, 1.0)[:, None]
    tl.store(p_o, o.to(OUT.dtype.element_ty), mask=m_o)
    if HAS_LSE:
        lse = tl.where(l > 0, (m + tl.log2(tl.where(l > 0, l, 1.0))) * LN2, float("-inf"))
        tl.debug_barrier()  # several warps hold a row: all must have read before one of them overwrites it
        tl.store(LSE + g * length + row_q, lse, mask=valid_q)
