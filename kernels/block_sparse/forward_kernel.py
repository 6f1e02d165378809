# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernel of ``block_sparse/forward.py``."""

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
    logits,
    softmax_step,
)
from ..block_linear.forward_kernel import feature
from ..tiling_kernel import grid_size, load_box, tile_corner, tile_count
from ..windows.visible_kernel import query_intervals, tile_rows, visible

__all__ = ["block_sparse_fwd_kernel", "list_of", "load_listed", "load_pair", "query_rows"]


@triton.jit
def query_rows(item, is_global, queries, window, S: tl.constexpr):
    """Positions (BM,) along each axis of the queries of an item, whether they are valid, and their rows in the
    sequence."""
    QB: tl.constexpr = S.QB
    lane = tl.arange(0, S.BM)
    q, valid, row = tile_rows(item // S.Q_PARTS, item % S.Q_PARTS * S.BM + lane, queries, window, QB, S)
    if S.GLOBAL_QUERIES:
        global_row = global_row_of(item * S.BM + lane, queries)
        row = tl.where(is_global, global_row, row)
        valid = tl.where(is_global, global_row < queries.length, valid)
    return q, valid, row


@triton.jit
def list_of(lists, bh, tile, n_tiles):
    """Pointer to the list of one of n_tiles tiles of a head, its number of full tiles, and its length."""
    which = tl.where(lists.stride > 0, bh, 0)
    place = which * n_tiles + tile
    p_list = lists.indices + which.to(tl.int64) * lists.stride
    if lists.starts is not None:
        p_list += tl.load(lists.starts + place)
    else:
        p_list += tile.to(tl.int64) * lists.longest
    n_listed = tl.load(lists.counts + place)
    n_full = n_listed
    if lists.full_counts is not None:
        n_full = tl.load(lists.full_counts + place)
    return p_list, n_full, n_listed


@triton.jit
def load_pair(
    x, y, x_boxes, y_boxes, b, h, n_heads, tile, part, valid, row, grid, BOX: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Load a block of a tile of two tensors, such as keys and values: by descriptor, or the given rows by pointers."""
    if S.BOXES != "none":
        BOXES: tl.constexpr = S.BOXES
        b, h = b.to(tl.int32), h.to(tl.int32)
        b_x = load_box(x_boxes, b, h, n_heads, tile, part, grid, BOX, BLOCK, S.BLOCK_D, BOXES)
        b_y = load_box(y_boxes, b, h, n_heads, tile, part, grid, BOX, BLOCK, S.BLOCK_D, BOXES)
    else:
        b_x, b_y = load_two(x, y, b, h, row, valid, MASKED, S)
    return b_x, b_y


@triton.jit
def load_listed(
    key, value, k_boxes, v_boxes, key_mask, p_list, i, b, h, n_heads, keys, window, MASKED: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """Load the i-th block of the key tiles in a list: keys and values (BN, BLOCK_D), the positions of the keys along
    each axis, and whether they are valid."""
    KB: tl.constexpr = S.KB
    tile, part = tl.load(p_list + i // S.K_PARTS), i % S.K_PARTS
    k, valid, row = tile_rows(tile, part * S.BN + tl.arange(0, S.BN), keys, window, KB, S)
    valid = attended(key_mask, b, row, valid)
    b_k, b_v = load_pair(key, value, k_boxes, v_boxes, b, h, n_heads, tile, part, valid, row, keys, KB, S.BN, MASKED, S)
    return b_k, b_v, k, valid


@triton.jit
def _attend_rows(carry, b_q, key, value, b, h, row, valid, scale, MASKED: tl.constexpr, S: tl.constexpr):
    """Attend to keys at the given rows, visible to all queries if valid."""
    b_k, b_v = load_two(key, value, b, h, row, valid, MASKED, S)
    b_s = logits(b_q, b_k, S)
    if MASKED:
        b_s = tl.where(valid[None, :], b_s, float("-inf"))
    acc, m, l = carry
    return softmax_step(acc, m, l, b_s, b_v, scale, MASKED, S)


@triton.jit
def _attend_all(carry, b_q, key, value, key_mask, b, h, keys, scale, S: tl.constexpr):
    """Attend to all keys."""
    n_whole = keys.length // S.BN
    if key_mask.data is not None:
        n_whole = 0
    for i in range(n_whole):
        row = i * S.BN + tl.arange(0, S.BN)
        carry = _attend_rows(carry, b_q, key, value, b, h, row, row < keys.length, scale, False, S)
    for i in tl.range(n_whole, tl.cdiv(keys.length, S.BN), num_stages=1):
        row = i * S.BN + tl.arange(0, S.BN)
        valid = attended(key_mask, b, row, row < keys.length)
        carry = _attend_rows(carry, b_q, key, value, b, h, row, valid, scale, True, S)
    return carry


@triton.jit
def _attend_global(carry, b_q, key, value, key_mask, b, h, keys, scale, S: tl.constexpr):
    """Attend to the keys off the grid."""
    n_global = keys.length - grid_size(keys)
    n_whole = n_global // S.BN
    if key_mask.data is not None:
        n_whole = 0
    for i in range(n_whole):
        row = global_row_of(i * S.BN + tl.arange(0, S.BN), keys)
        carry = _attend_rows(carry, b_q, key, value, b, h, row, row >= 0, scale, False, S)
    for i in tl.range(n_whole, tl.cdiv(n_global, S.BN), num_stages=1):
        place = i * S.BN + tl.arange(0, S.BN)
        row = global_row_of(place, keys)
        valid = attended(key_mask, b, row, place < n_global)
        carry = _attend_rows(carry, b_q, key, value, b, h, row, valid, scale, True, S)
    return carry


@triton.jit
def _attend_pooled(carry, b_q, pooled_key, pooled_value, pooled_mask, n_pooled, b, h, scale, S: tl.constexpr):
    """Attend to the pooled keys."""
    for i in range(tl.cdiv(n_pooled, S.BN)):
        row = i * S.BN + tl.arange(0, S.BN)
        valid = attended(pooled_mask, b, row, row < n_pooled)
        carry = _attend_rows(carry, b_q, pooled_key, pooled_value, b, h, row, valid, scale, True, S)
    return carry


@triton.jit
def _attend_full(
    carry, b_q, key, value, k_boxes, v_boxes, key_mask, p_list, n_full, b, h, n_heads, keys, window, scale,
    S: tl.constexpr,
):  # fmt: skip
    """Attend to the first n_full tiles of a list, which need no window."""
    for i in range(n_full * S.K_PARTS):
        b_k, b_v, _k, valid = load_listed(
            key, value, k_boxes, v_boxes, key_mask, p_list, i, b, h, n_heads, keys, window, not S.WHOLE, S
        )
        b_s = logits(b_q, b_k, S)
        if not S.WHOLE:
            b_s = tl.where(valid[None, :], b_s, float("-inf"))
        acc, m, l = carry
        carry = softmax_step(acc, m, l, b_s, b_v, scale, S.K_PARTS > 1, S)
    return carry


@triton.jit
def _attend_partial(
    carry, b_q, q, key, value, k_boxes, v_boxes, key_mask, p_list, n_full, n_listed, tile_q, b, h, n_heads, queries,
    keys, window, scale, S: tl.constexpr,
):  # fmt: skip
    """Attend to the other tiles of a list, under the window; q: positions of the queries."""
    QB: tl.constexpr = S.QB
    intervals = query_intervals(window, q, queries, S)
    origin = tile_corner(tile_q, queries, QB)
    for i in range(n_full * S.K_PARTS, n_listed * S.K_PARTS):
        b_k, b_v, k, valid = load_listed(
            key, value, k_boxes, v_boxes, key_mask, p_list, i, b, h, n_heads, keys, window, True, S
        )
        m_visible = visible(q, k, valid, intervals, origin, window, False, S)
        b_s = tl.where(m_visible, logits(b_q, b_k, S), float("-inf"))
        acc, m, l = carry
        carry = softmax_step(acc, m, l, b_s, b_v, scale, True, S)
    return carry


@triton.jit
def _store_linear(p_o, m_rows, b_q, p_state, p_norm, p_eps, S: tl.constexpr):
    """Store φ(q) state / (φ(q)·norm + eps) to rows (BM,) of the output, BLOCK_E columns at a time: the whole state of a
    large head exceeds the shared memory."""
    d = tl.arange(0, S.BLOCK_D)
    FEATURE_MAP: tl.constexpr = S.FEATURE_MAP
    b_phi = feature(b_q.to(tl.float32), FEATURE_MAP, S.D)
    b_norm = tl.load(p_norm + d, mask=d < S.D, other=0.0)
    total = tl.sum(b_phi * b_norm[None, :], 1) + tl.load(p_eps)
    total = tl.where(total == 0, 1.0, total)[:, None]
    b_phi = b_phi.to(p_state.dtype.element_ty)
    for start in range(0, S.BLOCK_D, S.BLOCK_E):
        cols = start + tl.arange(0, S.BLOCK_E)
        m_state = (d < S.D)[:, None] & (cols < S.D)[None, :]
        b_state = tl.load(p_state + d[:, None] * S.D + cols[None, :], mask=m_state, other=0.0)
        b_linear = tl.dot(b_phi, b_state, input_precision=S.PRECISION) / total
        m_o = m_rows[:, None] & (cols < S.D)[None, :]
        tl.store(p_o[:, None] + cols[None, :], b_linear.to(p_o.dtype.element_ty), mask=m_o)


@triton.jit
def block_sparse_fwd_kernel(
    query, key, value, out, p_lse, key_mask, lists, window, pooled_key, pooled_value, pooled_mask, n_pooled, added,
    k_boxes, v_boxes, queries, keys, n_groups, n_heads, group, scale, S: tl.constexpr,
):  # fmt: skip
    """Attention of BM queries of one head. Global queries come first, because they take longest."""
    QB: tl.constexpr = S.QB
    KB: tl.constexpr = S.KB
    n_q_tiles = tile_count(queries, QB)
    n_global = tl.cdiv(queries.length - grid_size(queries), S.BM)
    is_global, bh, item = item_of(n_global, n_q_tiles * S.Q_PARTS, n_groups, S.GLOBAL_QUERIES)
    b, h = bh // n_heads, bh % n_heads
    hk, n_kv_heads = h // group, n_heads // group
    tile_q = item // S.Q_PARTS
    d = tl.arange(0, S.BLOCK_D)
    q, valid_q, row_q = query_rows(item, is_global, queries, window, S)
    # (BM, BLOCK_D)
    b_q = load_rows(head_of(query, b, h), row_q, valid_q, query.row, d, S.D, True)
    p_rows = head_of(out, b, h) + row_q.to(tl.int64) * out.row
    if S.STATE != "none":  # noqa: SIM102
        if not is_global:  # kept in the output until the end: the softmax needs the registers
            which = bh.to(tl.int64)
            if S.STATE == "of each tile":
                which = which * n_q_tiles + tile_q
            p_state, p_norm = added.state + which * S.D * S.D, added.norm + which * S.D
            _store_linear(p_rows, valid_q, b_q, p_state, p_norm, added.eps + bh, S)
            tl.debug_barrier()
    acc = tl.full((S.BM, S.BLOCK_D), 0.0, tl.float32)
    m = tl.full((S.BM,), float("-inf"), tl.float32)
    carry = (acc, m, tl.full((S.BM,), 0.0, tl.float32))
    if is_global:
        carry = _attend_all(carry, b_q, key, value, key_mask, b, hk, keys, scale, S)
    else:
        p_list, n_full, n_listed = list_of(lists, bh, tile_q, n_q_tiles)
        if S.FULL == "none":
            n_full = n_listed * 0
        elif S.FULL == "all but the last":  # noqa: SIM102
            # the very last tile of the grid can only be the last of an ascending list
            if n_listed > 0:
                last = tl.load(p_list + n_listed - 1)
                n_full = n_listed - (last == tile_count(keys, KB) - 1).to(tl.int32)
        if S.FULL != "none":
            carry = _attend_full(
                carry, b_q, key, value, k_boxes, v_boxes, key_mask, p_list, n_full, b, hk, n_kv_heads, keys, window,
                scale, S,
            )  # fmt: skip
        if S.PARTIAL:
            carry = _attend_partial(
                carry, b_q, q, key, value, k_boxes, v_boxes, key_mask, p_list, n_full, n_listed, tile_q, b, hk,
                n_kv_heads, queries, keys, window, scale, S,
            )  # fmt: skip
        if S.GLOBAL_KEYS:
            carry = _attend_global(carry, b_q, key, value, key_mask, b, hk, keys, scale, S)
        if pooled_key.data is not None:
            carry = _attend_pooled(carry, b_q, pooled_key, pooled_value, pooled_mask, n_pooled, b, hk, scale, S)
    acc, m, l = carry
    b_o, lse = finish_softmax(acc, m, l)
    p_o = p_rows[:, None] + d[None, :]
    m_o = valid_q[:, None] & (d < S.D)[None, :]
    if S.STATE != "none" or added.bias is not None:  # noqa: SIM102
        if not is_global:
            b_more = tl.full((S.BM, S.BLOCK_D), 0.0, tl.float32)
            if S.STATE != "none":
                b_more += tl.load(p_o, mask=m_o, other=0.0).to(tl.float32)
            if added.bias is not None:
                b_more += tl.load(added.bias + d, mask=d < S.D, other=0.0).to(tl.float32)[None, :]
            b_o += tl.where(l > 0, 1.0, 0.0)[:, None] * b_more
    tl.store(p_o, b_o.to(out.data.dtype.element_ty), mask=m_o)
    if p_lse is not None:
        tl.store(p_lse + bh.to(tl.int64) * queries.length + row_q, lse, mask=valid_q)
