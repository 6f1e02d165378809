"""Means of LLSA's pooled tokens, level by level, in Triton; the first level is memory bound."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, check_contiguous, next_power_of_2
from ..selection.pool import mask_arguments

__all__ = ["PooledTree", "pool_tree"]

WARPS = 1  # small programs leave no multiprocessor idle at the end
UNROLL = 16  # loads in flight at once, times three


class PooledTree(NamedTuple):
    """Means over the valid tokens that each pooled token covers; 0 if there is none. P tokens in total, level 1 first,
    and an empty one at index P, which index lists use as padding.

    query, key: for each level, (B, H, n, D) float32.
    number: (1|B, P + 1) float32, valid tokens covered by each; the first axis is 1 without a mask.
    weight: (1|B, P + 1) float32, log2 of the number.
    masked: whether there is a mask, so that a pooled token may cover no valid token.
    rows: index of the first token of each level.
    all_keys, all_values: (B*H, P + 1, D) in the keys' dtype; None if no values were given.
    """

    query: list[Tensor]
    key: list[Tensor]
    number: Tensor
    weight: Tensor
    masked: bool
    rows: list[int]
    all_keys: Tensor | None
    all_values: Tensor | None


def pool_tree(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    children: Sequence[Tensor],
    before: int,
    key_mask: Tensor | None = None,
) -> PooledTree:
    """Pool query, key and value to the levels of a tree, one launch per level. [LLSA, arXiv 2512.16615]

    Args:
        query, key, value: (B, H, S, D) of one shape, any floating dtype, any strides, D at most 256; value None = pool
            only the inputs of the selection.
        children: for each level (n, block) int64, tokens of the level below (for the first: positions on the grid), -1
            = none.
        before: rows in front of the grid.
        key_mask: (B, S) bool, True = valid; masked rows are never read. None = all are valid.
    """
    check_contiguous(**{f"children[{i}]": table for i, table in enumerate(children)})
    batch, heads, _, dim = query.shape
    sizes = [len(x) for x in children]
    rows = [sum(sizes[:i]) for i in range(len(sizes))]
    shape: tuple[int, ...] = (2, 1 if key_mask is None else batch, sum(sizes) + 1)
    numbers = torch.empty(shape, dtype=torch.float32, device=query.device)
    all_keys = all_values = None
    if value is not None:
        shape = (batch * heads, sum(sizes) + 1, dim)
        all_keys, all_values = (torch.empty(shape, dtype=key.dtype, device=key.device) for _ in range(2))
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    below: tuple[Tensor, Tensor, Tensor | None] = (query, key, value)
    for level, (table, n) in enumerate(zip(children, sizes, strict=True)):
        shape = (2 if value is None else 3, batch, heads, n, dim)
        means = torch.empty(shape, dtype=torch.float32, device=query.device)
        firsts = (-1 if level == 0 else rows[level - 1], rows[level])
        _launch_pool(below, means, table, numbers, firsts, before, key_mask, all_keys, all_values)
        queries.append(means[0])
        keys.append(means[1])
        below = (means[0], means[1], None if value is None else means[2])
    return PooledTree(queries, keys, numbers[0], numbers[1], key_mask is not None, rows, all_keys, all_values)


def _launch_pool(
    below: tuple[Tensor, Tensor, Tensor | None],
    means: Tensor,
    table: Tensor,
    numbers: Tensor,
    firsts: tuple[int, int],
    before: int,
    key_mask: Tensor | None,
    all_keys: Tensor | None,
    all_values: Tensor | None,
) -> None:
    query, key, value = below
    batch, heads, _, dim = query.shape
    n, block = table.shape
    is_first, is_last = firsts[0] < 0, firsts[1] + n + 1 == numbers.shape[2]
    mask, mask_b, mask_s, has_key_mask = mask_arguments(key_mask if is_first else None, query)
    given = key if value is None else value
    block_d = next_power_of_2(dim)
    nodes = max(1, 512 * WARPS // query.element_size() // block_d)  # each thread handles 16 bytes of the rows of a node
    n_made = n + is_last
    nodes = min(nodes, next_power_of_2(n_made))
    llsa_pool_fwd_kernel[(batch * heads * cdiv(n_made, nodes),)](
        query, key, given, mask, table, means, numbers[0], numbers[1], all_keys, all_values,
        *query.stride(), *key.stride(), *given.stride(), mask_b, mask_s,
        numbers.stride(1) if numbers.shape[1] > 1 else 0, heads, n, n_made, before if is_first else 0, *firsts,
        numbers.shape[2], batch * heads,
        BLOCK=block, UNROLL=min(UNROLL, next_power_of_2(block)), NODES=nodes, D=dim, BLOCK_D=block_d,
        HEADS_LAST=query.stride(1) < query.stride(2),
        IS_FIRST=is_first, HAS_KEY_MASK=has_key_mask, HAS_VALUE=value is not None, SHARED=numbers.shape[1] == 1,
        num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def llsa_pool_fwd_kernel(
    Q, K, V, KEY_MASK, CHILDREN, MEANS, NUMBER, WEIGHT, ALL_KEYS, ALL_VALUES, sqb, sqh, sqr, sqd, skb, skh, skr, skd,
    svb, svh, svr, svd, smb, smr, snb, n_heads, n, n_made, before, first_below, first, n_all, n_groups,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, NODES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HEADS_LAST: tl.constexpr, IS_FIRST: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_VALUE: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """NODES pooled tokens of one head per program. HEADS_LAST: heads are adjacent in memory, so that concurrent
    programs process the same tokens of different heads. SHARED: all batch elements have the same numbers. n_made: n
    plus, at the top level, the empty token."""
    if HEADS_LAST:
        h = (tl.program_id(0) % n_heads).to(tl.int64)
        rest = tl.program_id(0) // n_heads
        part = rest % tl.cdiv(n_made, NODES)
        b = (rest // tl.cdiv(n_made, NODES)).to(tl.int64)
    else:
        part = tl.program_id(0) % tl.cdiv(n_made, NODES)
        group = (tl.program_id(0) // tl.cdiv(n_made, NODES)).to(tl.int64)
        b, h = group // n_heads, group % n_heads
    g = b * n_heads + h
    node = part * NODES + tl.arange(0, NODES)
    total_q = tl.zeros((NODES, BLOCK_D), tl.float32)
    total_k = tl.zeros((NODES, BLOCK_D), tl.float32)
    total_v = tl.zeros((NODES, BLOCK_D), tl.float32)
    count = tl.zeros((NODES,), tl.float32)
    for start in range(0, BLOCK, UNROLL):
        for i in tl.static_range(UNROLL):
            # (NODES,): a row of the level below, and its weight
            inside = (node < n) & (start + i < BLOCK)
            child = tl.load(CHILDREN + node.to(tl.int64) * BLOCK + start + i, mask=inside, other=-1)
            inside = child >= 0
            row = child + before
            if IS_FIRST:
                if HAS_KEY_MASK:
                    inside = inside & (tl.load(KEY_MASK + b * smb + row * smr, mask=inside, other=0) != 0)
                weight = inside.to(tl.float32)
            else:
                weight = tl.load(NUMBER + b * snb + first_below + child, mask=inside, other=0.0)
            count += weight
            total_q += _weighted(Q + b * sqb + h * sqh, sqr, sqd, row, inside, weight, D, BLOCK_D, IS_FIRST)
            total_k += _weighted(K + b * skb + h * skh, skr, skd, row, inside, weight, D, BLOCK_D, IS_FIRST)
            if HAS_VALUE:
                total_v += _weighted(V + b * svb + h * svh, svr, svd, row, inside, weight, D, BLOCK_D, IS_FIRST)
    if (h == 0) & ((b == 0) | (not SHARED)):
        tl.store(NUMBER + b * snb + first + node, count, mask=node < n_made)
        weight = tl.where(count > 0, tl.log2(tl.maximum(count, 1.0)), float("-inf"))
        tl.store(WEIGHT + b * snb + first + node, weight, mask=node < n_made)
    factor = 1.0 / tl.maximum(count, 1.0)[:, None]
    d = tl.arange(0, BLOCK_D)
    m_o = (node < n)[:, None] & (d < D)[None, :]
    o_mean = (g * n + node)[:, None] * D + d[None, :]
    whole = tl.cast(n_groups, tl.int64) * n * D
    tl.store(MEANS + o_mean, total_q * factor, mask=m_o)
    tl.store(MEANS + whole + o_mean, total_k * factor, mask=m_o)
    if HAS_VALUE:
        tl.store(MEANS + 2 * whole + o_mean, total_v * factor, mask=m_o)
        o_all = (g * n_all + first + node)[:, None] * D + d[None, :]
        m_all = (node < n_made)[:, None] & (d < D)[None, :]
        tl.store(ALL_KEYS + o_all, (total_k * factor).to(ALL_KEYS.dtype.element_ty), mask=m_all)
        tl.store(ALL_VALUES + o_all, (total_v * factor).to(ALL_VALUES.dtype.element_ty), mask=m_all)


@triton.jit
def _weighted(
    x, stride_r, stride_d, row, inside, weight, D: tl.constexpr, BLOCK_D: tl.constexpr, IS_FIRST: tl.constexpr
):
    """Rows (NODES, BLOCK_D) float32 times their weights: 1 on the first level, and 0 for masked entries."""
    d = tl.arange(0, BLOCK_D)
    p_x = x + row[:, None] * stride_r + d[None, :].to(tl.int64) * stride_d
    b_x = tl.load(p_x, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    return b_x if IS_FIRST else b_x * weight[:, None]
