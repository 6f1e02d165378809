# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernel of ``llsa/tree.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention_kernel import attended, head_of, load_rows

__all__ = ["llsa_pool_fwd_kernel"]


@triton.jit
def _weighted(x, b, h, row, inside, weight, FIRST: tl.constexpr, S: tl.constexpr):
    """Rows (NODES, BLOCK_D) float32 times their weights: 1 on the first level, and 0 for masked entries."""
    b_x = load_rows(head_of(x, b, h), row, inside, x.row, tl.arange(0, S.BLOCK_D), S.D, True).to(tl.float32)
    return b_x if FIRST else b_x * weight[:, None]


@triton.jit
def llsa_pool_fwd_kernel(
    query, key, value, key_mask, p_children, p_means, numbers, p_all_keys, p_all_values, level, n_made, first_below,
    before, n_heads, n_groups, S: tl.constexpr,
):  # fmt: skip
    """NODES pooled tokens of one head per program; with HEADS_LAST concurrent programs process the same tokens of
    different heads. first_below: index of the first token of the level below; None = it is the sequence. n_made: tokens
    of the level plus, at the top, the empty one."""
    UNROLL: tl.constexpr = S.UNROLL
    n_parts = tl.cdiv(n_made, S.NODES)
    if S.HEADS_LAST:
        h = (tl.program_id(0) % n_heads).to(tl.int64)
        rest = tl.program_id(0) // n_heads
        part = rest % n_parts
        b = (rest // n_parts).to(tl.int64)
    else:
        part = tl.program_id(0) % n_parts
        group = (tl.program_id(0) // n_parts).to(tl.int64)
        b, h = group // n_heads, group % n_heads
    bh = b * n_heads + h
    node = part * S.NODES + tl.arange(0, S.NODES)
    # (NODES, BLOCK_D)
    total_q = tl.full((S.NODES, S.BLOCK_D), 0.0, tl.float32)
    total_k = tl.full((S.NODES, S.BLOCK_D), 0.0, tl.float32)
    total_v = tl.full((S.NODES, S.BLOCK_D), 0.0, tl.float32)
    number = tl.full((S.NODES,), 0.0, tl.float32)
    for start in range(0, S.BLOCK, UNROLL):
        for i in tl.static_range(UNROLL):
            # (NODES,): a row of the level below, and its weight
            inside = (node < level.length) & (start + i < S.BLOCK)
            child = tl.load(p_children + node.to(tl.int64) * S.BLOCK + start + i, mask=inside, other=-1)
            inside = child >= 0
            row = child + before
            if first_below is None:
                inside = attended(key_mask, b, row, inside)
                weight = inside.to(tl.float32)
            else:
                p_weight = numbers.number + b * numbers.batch + first_below + child
                weight = tl.load(p_weight, mask=inside, other=0.0)
            number += weight
            total_q += _weighted(query, b, h, row, inside, weight, first_below is None, S)
            total_k += _weighted(key, b, h, row, inside, weight, first_below is None, S)
            if value.data is not None:
                total_v += _weighted(value, b, h, row, inside, weight, first_below is None, S)
    if (h == 0) & ((b == 0) | (not S.SHARED)):
        place = b * numbers.batch + level.first + node
        tl.store(numbers.number + place, number, mask=node < n_made)
        weight = tl.where(number > 0, tl.log2(tl.maximum(number, 1.0)), float("-inf"))
        tl.store(numbers.weight + place, weight, mask=node < n_made)
    factor = 1.0 / tl.maximum(number, 1.0)[:, None]
    d = tl.arange(0, S.BLOCK_D)
    m_mean = (node < level.length)[:, None] & (d < S.D)[None, :]
    p_mean = p_means + (bh * level.length + node)[:, None] * S.D + d[None, :]
    size = tl.cast(n_groups, tl.int64) * level.length * S.D
    tl.store(p_mean, total_q * factor, mask=m_mean)
    tl.store(p_mean + size, total_k * factor, mask=m_mean)
    if value.data is not None:
        tl.store(p_mean + 2 * size, total_v * factor, mask=m_mean)
        place = (bh * level.total + level.first + node)[:, None] * S.D + d[None, :]
        m_all = (node < n_made)[:, None] & (d < S.D)[None, :]
        tl.store(p_all_keys + place, (total_k * factor).to(p_all_keys.dtype.element_ty), mask=m_all)
        tl.store(p_all_values + place, (total_v * factor).to(p_all_values.dtype.element_ty), mask=m_all)
