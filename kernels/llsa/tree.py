"""Means of LLSA's pooled tokens, level by level, in Triton; the first level is memory bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import mask_of, rows_of
from ..launch import cdiv, check_contiguous, next_power_of_2
from .arguments import Level, Numbers, PoolStatic
from .tree_kernel import llsa_pool_fwd_kernel

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
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    value = value if value is None or value.stride(-1) == 1 else value.contiguous()
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
        firsts = (rows[level - 1] if level else None, rows[level])
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
    firsts: tuple[int | None, int],
    before: int,
    key_mask: Tensor | None,
    all_keys: Tensor | None,
    all_values: Tensor | None,
) -> None:
    query, key, value = below
    batch, heads, _, dim = query.shape
    n, block = table.shape
    first_below, first = firsts
    is_last = first + n + 1 == numbers.shape[2]
    block_d = next_power_of_2(dim)
    nodes = max(1, 512 * WARPS // query.element_size() // block_d)  # each thread handles 16 bytes of the rows of a node
    n_made = n + is_last
    nodes = min(nodes, next_power_of_2(n_made))
    llsa_pool_fwd_kernel[(batch * heads * cdiv(n_made, nodes),)](
        rows_of(query), rows_of(key), rows_of(value), mask_of(key_mask if first_below is None else None),
        table, means, Numbers(numbers[0], numbers[1], numbers.stride(1) if numbers.shape[1] > 1 else 0), all_keys,
        all_values, Level(n, first, numbers.shape[2]), n_made, first_below, before if first_below is None else 0, heads,
        batch * heads,
        S=PoolStatic(
            D=dim, BLOCK_D=block_d, BLOCK=block, UNROLL=min(UNROLL, next_power_of_2(block)), NODES=nodes,
            HEADS_LAST=query.stride(1) < query.stride(2), SHARED=numbers.shape[1] == 1,
        ),
        num_warps=WARPS,
    )  # fmt: skip
