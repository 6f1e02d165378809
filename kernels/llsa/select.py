"""Selection of the blocks that each block of LLSA keeps, from the top of the tree down, in Triton.

All children of a pooled token select among the children of what it kept: a program reads those candidates once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..launch import cdiv, check_contiguous, exact_products, next_power_of_2
from ..selection.select import select_blocks
from .arguments import Inherited, Level, Parents, SelectStatic
from .select_kernel import llsa_select_fwd_kernel
from .tree import PooledTree

__all__ = ["MAX_CANDIDATES", "select_tree"]

MAX_CANDIDATES = 16384  # of one block, whose scores must fit the registers of one program
SCORES_A_WARP = 512  # 16 per thread
MAX_TILE = 1024  # maximum number of candidates for which 16 blocks are scored together; with more, one block at a time


def select_tree(
    pooled: PooledTree, children: Sequence[Tensor], places: Sequence[Tensor], topk: int, want_indices: bool = True
) -> tuple[list[Tensor], Tensor | None]:
    """Tokens kept by each pooled token, and the pooled tokens visible on the way to them. [LLSA, arXiv 2512.16615]

    Scores have float32 precision. With two levels or more, no tensor has (S/block)² entries.

    Args:
        pooled: of the tree. children: as in ``pool_tree``.
        places: for each level (n_below,) int64, flat position of each token of the level below in children.
        topk: blocks to keep at each level.
        want_indices: whether to return the indices of the visible pooled tokens.
    Returns: for each level (B*H, n_l, k) int32, tokens of that level kept, -1 = none; (B*H, n_2, m) int32, for each
        level-2 token the candidates at level 1 and those of its ancestors at the levels above except the top, as
        indices into all pooled tokens, P for none and for a token without valid tokens. None for a tree of one level.
    Raises: ValueError: more than MAX_CANDIDATES candidates at a level, or tables that are not contiguous.
    """
    for name, tables in (("children", children), ("places", places), ("query", pooled.query), ("key", pooled.key)):
        check_contiguous(**{f"{name}[{i}]": x for i, x in enumerate(tables)})
    check_contiguous(number=pooled.number)
    kept = [_select_top(pooled, topk)]
    indices = None
    for level in reversed(range(len(children) - 1)):
        above, place = children[level + 1], places[level + 2] if level + 2 < len(places) else None
        below, indices = _launch_select(pooled, level, kept[-1], above, indices, place, topk, want_indices)
        kept.append(below)
    return kept[::-1], indices


def _select_top(pooled: PooledTree, topk: int) -> Tensor:
    """Tokens of the top level kept by each of its tokens."""
    query, key = pooled.query[-1], pooled.key[-1]
    topk = min(topk, key.shape[2])
    if key.shape[2] <= min(MAX_TILE, MAX_CANDIDATES):
        return _launch_select(pooled, len(pooled.key) - 1, None, None, None, None, topk, False)[0]
    if not pooled.masked:
        return select_blocks(query, key, topk, 0, want_marginal=False)[0]
    valid_blocks = pooled.number[:, pooled.rows[-1] : -1] > 0
    lists, _ = select_blocks(query, key, topk, 0, valid_blocks, want_marginal=False)
    missing = torch.arange(topk, device=lists.device) >= valid_blocks.sum(-1)[:, None]  # (B, k)
    return lists.masked_fill_(missing.repeat_interleave(query.shape[1], 0)[:, None], -1)


def _launch_select(
    pooled: PooledTree,
    level: int,
    kept_above: Tensor | None,
    above: Tensor | None,
    indices_above: Tensor | None,
    place: Tensor | None,
    topk: int,
    want_indices: bool,
) -> tuple[Tensor, Tensor | None]:
    """Tokens of this level kept by each of its tokens, and the pooled tokens visible to each token of the level above,
    down to this level. above None: select among the whole level."""
    query, key, first = pooled.query[level], pooled.key[level], pooled.rows[level]
    batch, heads, n, dim = query.shape
    if above is None or kept_above is None:
        n_above, block, n_kept, n_candidates = 1, n, 1, n
    else:
        (n_above, block), n_kept = above.shape, kept_above.shape[2]
        n_candidates = n_kept * block
    n_inherited = 0 if indices_above is None else indices_above.shape[2]
    topk = min(topk, n_candidates)
    kept = torch.empty(batch * heads, n, topk, dtype=torch.int32, device=query.device)
    indices = None
    if want_indices:
        shape = (batch * heads, n_above, n_candidates + n_inherited)
        indices = torch.empty(shape, dtype=torch.int32, device=query.device)
    lanes = max(16, next_power_of_2(n_candidates))
    if n_candidates > MAX_CANDIDATES:
        raise ValueError(
            f"topk blocks of the level above hold {n_candidates} candidates, and the Triton kernel supports "
            f"{MAX_CANDIDATES}: make topk or block_size smaller, or use backend='torch'"
        )
    rows = 16 if lanes <= MAX_TILE else 1
    n_above2 = 0 if place is None or indices_above is None else indices_above.shape[1]
    llsa_select_fwd_kernel[(batch * heads * n_above * cdiv(block, rows),)](
        query, key, pooled.number if pooled.masked else None, kept, indices, Parents(kept_above, above, n_above),
        Inherited(indices_above, place, n_above2, n_inherited), Level(n, first, pooled.number.shape[1]), heads,
        S=SelectStatic(
            D=dim, BLOCK_D=min(next_power_of_2(max(dim, 16)), 16 if rows > 1 else max(1, 65536 // lanes)), TOPK=topk,
            BLOCK_K=next_power_of_2(topk), N_KEPT=n_kept, BLOCK=0 if above is None else block, ROWS=rows, LANES=lanes,
            PRECISION=exact_products(),
        ),
        num_warps=min(16, max(1, rows * lanes // SCORES_A_WARP)),
    )  # fmt: skip
    return kept, indices
