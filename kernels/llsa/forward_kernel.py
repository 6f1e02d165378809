# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of ``llsa/forward.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention_kernel import (
    attended,
    finish_softmax,
    global_row_of,
    head_of,
    item_of,
    load_rows,
    load_two,
    softmax_step,
)

__all__ = [
    "block_rows",
    "coarse_item",
    "kept_rows",
    "listed_rows",
    "llsa_coarse_fwd_kernel",
    "llsa_fine_fwd_kernel",
    "load_pooled",
    "pooled_head",
    "pooled_list",
    "query_rows",
    "top_rows",
]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def coarse_item(queries, tokens, n_groups, S: tl.constexpr):
    """Whether the queries of a program of a coarse kernel are global, its head and its tile. Global queries come first,
    because they take longest."""
    n_global = tl.cdiv(tokens.length - tokens.g2, S.BM)
    return item_of(n_global, queries.n_nodes * tl.cdiv(queries.n_slots, S.BM), n_groups, S.GLOBAL)


@triton.jit
def query_rows(item, is_global, queries, tokens, S: tl.constexpr):
    """Row in the sequence of each query of a tile, (BM,), and whether it is valid."""
    lane = tl.arange(0, S.BM)
    n_parts = tl.cdiv(queries.n_slots, S.BM)
    on_grid = tl.where(is_global, 0, item)  # there may be more tiles of global tokens than of the grid
    slot = on_grid % n_parts * S.BM + lane
    valid = slot < queries.n_slots
    block = slot // S.BLOCK
    if queries.nodes is not None:
        p_block = queries.nodes + (on_grid // n_parts).to(tl.int64) * S.BLOCK + block
        block = tl.load(p_block, mask=valid, other=-1).to(tl.int32)
        valid = block >= 0
    p_place = queries.blocks + block.to(tl.int64) * S.BLOCK + slot % S.BLOCK
    place = tl.load(p_place, mask=valid, other=-1).to(tl.int32)
    valid = place >= 0
    row = place + tokens.before
    if S.GLOBAL:
        global_row = global_row_of(item * S.BM + lane, tokens)
        row = tl.where(is_global, global_row, row)
        valid = tl.where(is_global, global_row < tokens.length, valid)
    return row, valid


@triton.jit
def block_rows(p_blocks, n_blocks, tokens, S: tl.constexpr):
    """Head and block of a program of a fine kernel, row in the sequence of each of its queries, (BM,), and whether it
    is valid."""
    N_PARTS: tl.constexpr = (S.BLOCK + S.BM - 1) // S.BM
    part = tl.program_id(0) % N_PARTS
    block = tl.program_id(0) // N_PARTS % n_blocks
    slot = part * S.BM + tl.arange(0, S.BM)
    place = tl.load(p_blocks + block.to(tl.int64) * S.BLOCK + slot, mask=slot < S.BLOCK, other=-1)
    return tl.program_id(0) // (N_PARTS * n_blocks), block, place + tokens.before, place >= 0


@triton.jit
def kept_rows(p_kept, p_blocks, key_mask, b, place, tokens, S: tl.constexpr):
    """Row in the sequence of the keys at the given positions in the concatenated kept blocks, and whether they are
    valid."""
    if S.WHOLE:
        block = tl.load(p_kept + place // S.BLOCK)
        row = tl.load(p_blocks + block.to(tl.int64) * S.BLOCK + place % S.BLOCK) + tokens.before
        valid = row >= 0
    else:
        block = tl.load(p_kept + place // S.BLOCK, mask=place < S.N_KEPT * S.BLOCK, other=-1)
        p_row = p_blocks + block.to(tl.int64) * S.BLOCK + place % S.BLOCK
        row = tl.load(p_row, mask=block >= 0, other=-1)
        valid = row >= 0
        row += tokens.before
        valid = attended(key_mask, b, row, valid)
    return row, valid


@triton.jit
def pooled_head(pooled, bh, b, S: tl.constexpr):
    """Pointers to the pooled keys, values and biases of a head."""
    first = bh.to(tl.int64) * pooled.length * S.D
    return pooled.key + first, pooled.value + first, pooled.bias + b.to(tl.int64) * pooled.bias_batch


@triton.jit
def pooled_list(pooled, bh, item, queries, S: tl.constexpr):
    """Pointer to the rows of pooled keys visible to a tile of queries."""
    node = bh.to(tl.int64) * queries.n_nodes + item // tl.cdiv(queries.n_slots, S.BM)
    return pooled.indices + node * pooled.n_indices


@triton.jit
def listed_rows(p_list, start, pooled, S: tl.constexpr):
    """Rows (BN,) of the pooled keys at the given place in a list, and after it."""
    lane = tl.arange(0, S.BN)
    if S.INDICES_WHOLE:
        return tl.load(p_list + start + lane)
    return tl.load(p_list + start + lane, mask=start + lane < pooled.n_indices, other=pooled.length - 1)


@triton.jit
def top_rows(start, pooled, S: tl.constexpr):
    """Rows (BN,) of pooled keys of the top level, from the given row on."""
    row = start + tl.arange(0, S.BN)
    if not S.TOP_WHOLE:
        row = tl.minimum(row, pooled.length - 1)
    return row


@triton.jit
def load_pooled(pointers, row, S: tl.constexpr):
    """Load pooled keys and values (BN, BLOCK_D) of a head."""
    d = tl.arange(0, S.BLOCK_D)
    b_k = load_rows(pointers[0], row, row >= 0, S.D, d, S.D, False)
    return b_k, load_rows(pointers[1], row, row >= 0, S.D, d, S.D, False)


@triton.jit
def _attend(carry, b_q, b_k, b_v, bias, scale, S: tl.constexpr):
    """One step of the online softmax; scale is in units of log2, as is bias (BN,), -inf for masked keys."""
    acc, m, l = carry
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=S.PRECISION) * scale + bias[None, :]
    return softmax_step(acc, m, l, b_s, b_v, 1.0, True, S)


@triton.jit
def _attend_pooled(carry, b_q, pointers, row, bias, scale, S: tl.constexpr):
    """Attend to pooled keys at the given rows; bias: common to them, None = of each row."""
    if bias is None:  # noqa: SIM108
        b_bias = tl.load(pointers[2] + row)
    else:
        b_bias = tl.full((S.BN,), 0.0, tl.float32) + bias
    b_k, b_v = load_pooled(pointers, row, S)
    return _attend(carry, b_q, b_k, b_v, b_bias, scale, S)


@triton.jit
def _attend_tokens(carry, b_q, key, value, b, h, row, valid, scale, S: tl.constexpr):
    """Attend to keys of the sequence at the given rows, if valid."""
    b_k, b_v = load_two(key, value, b, h, row, valid, True, S)
    return _attend(carry, b_q, b_k, b_v, tl.where(valid, 0.0, float("-inf")), scale, S)


@triton.jit
def llsa_coarse_fwd_kernel(
    query, key, value, out, p_lse, key_mask, queries, pooled, tokens, n_groups, n_heads, scale, S: tl.constexpr
):
    """Coarse attention of a tile of queries in tree order: the pooled tokens that they all attend to, and the global
    keys. Global queries attend to every key."""
    is_global, bh, item = coarse_item(queries, tokens, n_groups, S)
    b, h = bh // n_heads, bh % n_heads
    lane, d = tl.arange(0, S.BN), tl.arange(0, S.BLOCK_D)
    row_q, valid_q = query_rows(item, is_global, queries, tokens, S)
    # (BM, BLOCK_D)
    b_q = load_rows(head_of(query, b, h), row_q, valid_q, query.row, d, S.D, not S.ALL_SLOTS)
    acc = tl.full((S.BM, S.BLOCK_D), 0.0, tl.float32)
    m = tl.full((S.BM,), float("-inf"), tl.float32)
    carry = (acc, m, tl.full((S.BM,), 0.0, tl.float32))
    if is_global:
        for start in range(0, tokens.length, S.BN):
            row = start + lane
            valid = attended(key_mask, b, row, row < tokens.length)
            carry = _attend_tokens(carry, b_q, key, value, b, h, row, valid, scale, S)
    else:
        if pooled.key is not None:
            pointers = pooled_head(pooled, bh, b, S)
            if pooled.indices is not None:
                p_list = pooled_list(pooled, bh, item, queries, S)
                for start in range(0, pooled.n_indices, S.BN):
                    row = listed_rows(p_list, start, pooled, S)
                    carry = _attend_pooled(carry, b_q, pointers, row, pooled.indices_bias, scale, S)
            for start in range(pooled.top, pooled.length - 1, S.BN):
                row = top_rows(start, pooled, S)
                carry = _attend_pooled(carry, b_q, pointers, row, pooled.top_bias, scale, S)
        if S.GLOBAL:
            n_global = tokens.length - tokens.g2
            for start in tl.range(0, n_global, S.BN, num_stages=1):
                row = global_row_of(start + lane, tokens)
                valid = attended(key_mask, b, row, start + lane < n_global)
                carry = _attend_tokens(carry, b_q, key, value, b, h, row, valid, scale, S)
    acc, m, l = carry

    tl.debug_barrier()  # keeps the compiler from holding the rows in registers all the time
    row_q, valid_q = query_rows(item, is_global, queries, tokens, S)
    b_o, lse = finish_softmax(acc, m, l)
    p_o = head_of(out, b, h) + row_q.to(tl.int64)[:, None] * out.row + d[None, :]
    tl.store(p_o, b_o.to(out.data.dtype.element_ty), mask=valid_q[:, None] & (d < S.D)[None, :])
    tl.store(p_lse + bh.to(tl.int64) * tokens.length + row_q, lse, mask=valid_q)


@triton.jit
def llsa_fine_fwd_kernel(
    query, key, value, out, p_lse, p_coarse_lse, key_mask, p_kept, p_blocks, tokens, n_blocks, n_heads, scale,
    S: tl.constexpr,
):  # fmt: skip
    """Fine attention of BM queries of a level-1 block over the tokens of its kept blocks. p_coarse_lse: log-sum-exp of
    the coarse kernel's result in ``out``, to be merged with it; None = there is none. May be p_lse."""
    bh, block, row_q, valid_q = block_rows(p_blocks, n_blocks, tokens, S)
    b, h = bh // n_heads, bh % n_heads
    lane, d = tl.arange(0, S.BN), tl.arange(0, S.BLOCK_D)
    # (BM, BLOCK_D)
    b_q = load_rows(head_of(query, b, h), row_q, valid_q, query.row, d, S.D, not S.ALL_SLOTS)
    first_row = bh.to(tl.int64) * tokens.length
    p_o = head_of(out, b, h) + row_q.to(tl.int64)[:, None] * out.row + d[None, :]
    m_o = valid_q[:, None] & (d < S.D)[None, :]
    if p_coarse_lse is not None:  # prefetched for the merge at the end
        m_coarse = tl.load(p_coarse_lse + first_row + row_q, mask=valid_q, other=float("-inf")) * LOG2E
        b_coarse = tl.load(p_o, mask=m_o, other=0.0)
    acc = tl.full((S.BM, S.BLOCK_D), 0.0, tl.float32)
    m = tl.full((S.BM,), float("-inf"), tl.float32)
    carry = (acc, m, tl.full((S.BM,), 0.0, tl.float32))

    p_kept += (bh.to(tl.int64) * n_blocks + block) * S.N_KEPT
    for start in range(0, S.N_KEPT * S.BLOCK, S.BN):
        row, valid = kept_rows(p_kept, p_blocks, key_mask, b, start + lane, tokens, S)
        b_k, b_v = load_two(key, value, b, h, row, valid, not S.WHOLE, S)
        bias = tl.full((S.BN,), 0.0, tl.float32) if S.WHOLE else tl.where(valid, 0.0, float("-inf"))
        carry = _attend(carry, b_q, b_k, b_v, bias, scale, S)
    acc, m, l = carry

    if p_coarse_lse is not None:
        m_fine = m
        m = tl.maximum(m, m_coarse)
        shift = tl.where(m == float("-inf"), 0.0, m)
        alpha, beta = tl.exp2(m_fine - shift), tl.exp2(m_coarse - shift)
        l = l * alpha + beta
        acc = acc * alpha[:, None] + b_coarse.to(tl.float32) * beta[:, None]
    b_o, lse = finish_softmax(acc, m, l)
    tl.store(p_o, b_o.to(out.data.dtype.element_ty), mask=m_o)
    if p_lse is not None:
        tl.debug_barrier()  # several warps hold a row: all must have read before one of them overwrites it
        tl.store(p_lse + first_row + row_q, lse, mask=valid_q)
