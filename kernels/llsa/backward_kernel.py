# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of ``llsa/backward.py``; the formulas are those of ``block_sparse/backward_kernel.py``, with weights added to
the logits of pooled tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention_kernel import add_dkv, add_dq, attended, global_row_of, head_of, load_queries, load_two, weights
from .forward_kernel import (
    block_rows,
    coarse_item,
    kept_rows,
    listed_rows,
    load_pooled,
    pooled_head,
    pooled_list,
    query_rows,
    top_rows,
)

__all__ = ["llsa_coarse_bwd_dq_kernel", "llsa_dkv_kernel", "llsa_fine_bwd_dq_kernel"]


@triton.jit
def _add_dq(dq, held, b_k, b_v, bias, scale, S: tl.constexpr):
    """Add dS k of a tile of keys; held: what `load_queries` returned. bias (BN,) is -inf for masked keys."""
    b_q, b_do, lse, delta = held
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=S.PRECISION) * scale + bias[None, :]
    return add_dq(dq, weights(b_s - lse[:, None]), b_do, delta, b_k, b_v, S)


@triton.jit
def _add_dq_pooled(dq, held, pointers, row, scale, S: tl.constexpr):
    """Add dS k of pooled keys at the given rows."""
    b_k, b_v = load_pooled(pointers, row, S)
    return _add_dq(dq, held, b_k, b_v, tl.load(pointers[2] + row), scale, S)


@triton.jit
def _add_dq_tokens(dq, held, key, value, b, h, row, valid, scale, S: tl.constexpr):
    """Add dS k of keys of the sequence at the given rows, if valid."""
    b_k, b_v = load_two(key, value, b, h, row, valid, True, S)
    return _add_dq(dq, held, b_k, b_v, tl.where(valid, 0.0, float("-inf")), scale, S)


@triton.jit
def llsa_coarse_bwd_dq_kernel(
    query, key, value, d_out, p_lse_delta, d_query, key_mask, queries, pooled, tokens, n_groups, n_heads, scale,
    grad_scale, S: tl.constexpr,
):  # fmt: skip
    """Gradient of queries from pooled and global keys, in the tiles of the forward's coarse kernel; complete for global
    queries."""
    is_global, bh, item = coarse_item(queries, tokens, n_groups, S)
    b, h = bh // n_heads, bh % n_heads
    lane, d = tl.arange(0, S.BN), tl.arange(0, S.BLOCK_D)
    row_q, valid_q = query_rows(item, is_global, queries, tokens, S)
    p_lse_delta += bh.to(tl.int64) * tokens.length * 2
    held = load_queries(query, d_out, p_lse_delta, b, h, row_q, valid_q, S)
    dq = tl.full((S.BM, S.BLOCK_D), 0.0, tl.float32)
    if pooled.key is not None:  # noqa: SIM102
        if is_global == 0:
            pointers = pooled_head(pooled, bh, b, S)
            if pooled.indices is not None:
                p_list = pooled_list(pooled, bh, item, queries, S)
                for start in range(0, pooled.n_indices, S.BN):
                    dq = _add_dq_pooled(dq, held, pointers, listed_rows(p_list, start, pooled, S), scale, S)
            for start in range(pooled.top, pooled.length - 1, S.BN):
                dq = _add_dq_pooled(dq, held, pointers, top_rows(start, pooled, S), scale, S)
    if S.GLOBAL:
        # global queries attend to all keys, grid queries to the global ones
        n_visible = tl.where(is_global, tokens.length, tokens.length - tokens.g2)
        for start in range(0, n_visible, S.BN):
            row = tl.where(is_global, start + lane, global_row_of(start + lane, tokens))
            valid = attended(key_mask, b, row, start + lane < n_visible)
            dq = _add_dq_tokens(dq, held, key, value, b, h, row, valid, scale, S)
    p_dq = head_of(d_query, b, h) + row_q.to(tl.int64)[:, None] * d_query.row + d[None, :]
    m_dq = valid_q[:, None] & (d < S.D)[None, :]
    tl.store(p_dq, (dq * grad_scale).to(d_query.data.dtype.element_ty), mask=m_dq)


@triton.jit
def llsa_fine_bwd_dq_kernel(
    query, key, value, d_out, p_lse_delta, d_query, key_mask, p_kept, p_blocks, tokens, n_blocks, n_heads, scale,
    grad_scale, S: tl.constexpr,
):  # fmt: skip
    """Gradient of BM queries of a block from the tokens of its kept blocks. With ADD, it is added to the coarse
    kernel's result in d_query."""
    bh, block, row_q, valid_q = block_rows(p_blocks, n_blocks, tokens, S)
    b, h = bh // n_heads, bh % n_heads
    lane, d = tl.arange(0, S.BN), tl.arange(0, S.BLOCK_D)
    p_lse_delta += bh.to(tl.int64) * tokens.length * 2
    held = load_queries(query, d_out, p_lse_delta, b, h, row_q, valid_q, S)
    dq = tl.full((S.BM, S.BLOCK_D), 0.0, tl.float32)
    p_kept += (bh.to(tl.int64) * n_blocks + block) * S.N_KEPT
    for start in range(0, S.N_KEPT * S.BLOCK, S.BN):
        row, valid = kept_rows(p_kept, p_blocks, key_mask, b, start + lane, tokens, S)
        dq = _add_dq_tokens(dq, held, key, value, b, h, row, valid, scale, S)
    dq *= grad_scale
    p_dq = head_of(d_query, b, h) + row_q.to(tl.int64)[:, None] * d_query.row + d[None, :]
    m_dq = valid_q[:, None] & (d < S.D)[None, :]
    if S.ADD:
        dq += tl.load(p_dq, mask=m_dq, other=0.0).to(tl.float32)
    tl.store(p_dq, dq.to(d_query.data.dtype.element_ty), mask=m_dq)


@triton.jit
def _interval_rows(i, interval):
    """Rows of an interval."""
    return tl.where(i < interval.cut, i, i + interval.skip)


@triton.jit
def _key_rows(keys, tile, part, S: tl.constexpr):
    """Rows (BN,) of the keys of a tile, whether they are valid, and the rows of their gradients: those of an interval
    are stored contiguously."""
    lane = part * S.BN + tl.arange(0, S.BN)
    if keys.table is not None:
        p_row = keys.table + tile.to(tl.int64) * S.BLOCK + lane
        row = tl.load(p_row, mask=lane < S.BLOCK, other=-1).to(tl.int32)
        return row + keys.first, row >= 0, row + keys.first
    else:
        place = tile * S.BN + lane
        return _interval_rows(place, keys), place < keys.length, place


@triton.jit
def _listed_rows(p_list, n_listed, lists, place, PLACES: tl.constexpr, S: tl.constexpr):
    """Positions on the grid of the queries at the given places in a list of blocks, or of level-2 tokens, of PLACES
    queries each; negative = none."""
    block = tl.load(p_list + place // PLACES, mask=place < n_listed * PLACES, other=-1)
    if lists.nodes is not None:
        p_block = lists.nodes + block.to(tl.int64) * S.BLOCK + place % PLACES // S.BLOCK
        block = tl.load(p_block, mask=block >= 0, other=-1).to(tl.int32)
    return tl.load(lists.blocks + block.to(tl.int64) * S.BLOCK + place % S.BLOCK, mask=block >= 0, other=-1)


@triton.jit
def _add_dkv(carry, b_k, b_v, bias, query, d_out, p_lse_delta, b, h, row, valid, scale, S: tl.constexpr):
    """Add dSᵀ q and Pᵀ dO (BN, BLOCK_D) of queries at the given rows; keys are the rows of all products."""
    dk, dv = carry
    b_q, b_do, lse, delta = load_queries(query, d_out, p_lse_delta, b, h, row, valid, S)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=S.PRECISION) * scale + bias[:, None]
    return add_dkv(dk, dv, weights(b_s - lse[None, :]), b_do, delta, b_q, b_v, S)


@triton.jit
def llsa_dkv_kernel(
    query, key, value, d_out, p_lse_delta, d_key, d_value, key_mask, key_bias, above, keys, lists, splits, tokens,
    n_groups, n_heads, scale, grad_scale, S: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys of one head: from the queries in their tile's list, and from an interval of queries."""
    N_PARTS: tl.constexpr = 1 if keys.table is None else (S.BLOCK + S.BN - 1) // S.BN
    part = tl.program_id(0) % N_PARTS
    tile = tl.program_id(0) // N_PARTS % keys.n_tiles
    rest = tl.program_id(0) // (N_PARTS * keys.n_tiles)
    bh, split = (rest % n_groups).to(tl.int64), rest // n_groups
    b, h = bh // n_heads, bh % n_heads
    lane, d = tl.arange(0, S.BM), tl.arange(0, S.BLOCK_D)
    row_k, valid_k, row_dk = _key_rows(keys, tile, part, S)
    visible = attended(key_mask, b, row_k, valid_k)
    bias = tl.where(visible, 0.0, float("-inf"))
    if key_bias.data is not None:
        bias = tl.load(key_bias.data + b * key_bias.batch + row_k, mask=valid_k, other=float("-inf"))
    # (BN, BLOCK_D)
    b_k, b_v = load_two(key, value, b, h, row_k, visible, True, S)
    dk = tl.full((S.BN, S.BLOCK_D), 0.0, tl.float32)
    carry = (dk, tl.full((S.BN, S.BLOCK_D), 0.0, tl.float32))
    p_lse_delta += bh * tokens.length * 2
    if lists.data is not None:
        PLACES: tl.constexpr = S.BLOCK if lists.nodes is None else S.BLOCK * S.BLOCK
        p_ends = lists.ends + bh * (keys.n_tiles + 1) + tile
        begin = tl.load(p_ends)
        n_listed = tl.load(p_ends + 1) - begin
        p_list = lists.data + bh * lists.stride + begin
        for start in range(0, n_listed * PLACES, S.BM):
            place = _listed_rows(p_list, n_listed, lists, start + lane, PLACES, S)
            row = place + tokens.before
            carry = _add_dkv(carry, b_k, b_v, bias, query, d_out, p_lse_delta, b, h, row, place >= 0, scale, S)
    if splits.length is not None:
        end = tl.minimum((split + 1) * splits.rows, splits.length)
        for start in range(split * splits.rows, end, S.BM):
            valid = start + lane < end
            row = _interval_rows(start + lane, splits)
            carry = _add_dkv(carry, b_k, b_v, bias, query, d_out, p_lse_delta, b, h, row, valid, scale, S)
    dk, dv = carry
    dk *= grad_scale
    if above.key is not None:
        place = (bh * keys.n_tiles + tile) * S.D + d
        dk += tl.load(above.key + place, mask=d < S.D, other=0.0)[None, :]
        dv += tl.load(above.value + place, mask=d < S.D, other=0.0)[None, :]
    dk = tl.where(visible[:, None], dk, 0.0)  # masked keys have no gradient
    dv = tl.where(visible[:, None], dv, 0.0)
    first = split.to(tl.int64) * splits.stride + b * d_key.batch + h * d_key.head
    offset = first + row_dk.to(tl.int64)[:, None] * d_key.row + d[None, :]
    m_d = valid_k[:, None] & (d < S.D)[None, :]
    tl.store(d_key.data + offset, dk.to(d_key.data.dtype.element_ty), mask=m_d)
    tl.store(d_value.data + offset, dv.to(d_value.data.dtype.element_ty), mask=m_d)
