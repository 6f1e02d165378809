"""Selection of the blocks that each block of LLSA keeps, from the top of the tree down, in Triton.

All children of a pooled token select among the children of what it kept: a program reads those candidates once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, check_contiguous, exact_products, next_power_of_2
from ..selection.select import ordered, select_blocks
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
    number = pooled.number
    llsa_select_fwd_kernel[(batch * heads * n_above * cdiv(block, rows),)](
        query, key, number, kept_above, above, kept, indices, indices_above, place, heads, n, n_above, number.shape[1],
        first, 0 if place is None or indices_above is None else indices_above.shape[1], n_inherited,
        TOPK=topk, N_KEPT=n_kept, BLOCK=0 if above is None else block, D=dim, ROWS=rows, LANES=lanes,
        BLOCK_D=min(next_power_of_2(max(dim, 16)), 16 if rows > 1 else max(1, 65536 // lanes)),
        BLOCK_K=next_power_of_2(topk), HAS_EMPTY=pooled.masked, WANT_INDICES=want_indices, INHERITS=n_inherited > 0,
        PRECISION=exact_products(), num_warps=min(16, max(1, rows * lanes // SCORES_A_WARP)),
    )  # fmt: skip
    return kept, indices


@triton.jit
def llsa_select_fwd_kernel(
    Q, K, NUMBER, KEPT_ABOVE, ABOVE, KEPT, INDICES, INDICES_ABOVE, PLACE, n_heads, n, n_above, n_all, first, n_above2,
    n_inherited, TOPK: tl.constexpr, N_KEPT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, HAS_EMPTY: tl.constexpr,
    WANT_INDICES: tl.constexpr, INHERITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Selection of ROWS children of one token of the level above; BLOCK 0: of the top level, where all are
    candidates."""
    lane = tl.arange(0, LANES)
    slots = tl.arange(0, ROWS)
    if BLOCK == 0:
        parts = tl.cdiv(n, ROWS)
        part = tl.program_id(0) % parts
        parent = 0
        g = (tl.program_id(0) // parts).to(tl.int64)
        slot = (part * ROWS + slots).to(tl.int64)
        own = tl.where(slot < n, slot, -1)
        found = tl.where(lane < n, lane, -1).to(tl.int64)
    else:
        parts: tl.constexpr = (BLOCK + ROWS - 1) // ROWS  # type: ignore[no-redef]
        part = tl.program_id(0) % parts
        parent = tl.program_id(0) // parts % n_above
        g = (tl.program_id(0) // (parts * n_above)).to(tl.int64)
        p_kept = KEPT_ABOVE + (g * n_above + parent) * N_KEPT + lane // BLOCK
        node = tl.load(p_kept, mask=lane < N_KEPT * BLOCK, other=-1)
        p_found = ABOVE + node.to(tl.int64) * BLOCK + lane % BLOCK
        found = tl.load(p_found, mask=node >= 0, other=-1)  # (LANES,) candidates
        slot = part * ROWS + slots
        p_own = ABOVE + parent.to(tl.int64) * BLOCK + slot
        own = tl.load(p_own, mask=slot < BLOCK, other=-1)  # (ROWS,) tokens of the selection
    if HAS_EMPTY:
        p_number = NUMBER + g // n_heads * n_all + first + found
        found = tl.where(tl.load(p_number, mask=found >= 0, other=0.0) > 0, found, -1)

    scores = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        p_q = Q + (g * n + own[:, None]) * D + d[None, :]
        b_q = tl.load(p_q, mask=(own >= 0)[:, None] & (d < D)[None, :], other=0.0)
        p_k = K + (g * n + found[:, None]) * D + d[None, :]
        b_k = tl.load(p_k, mask=(found >= 0)[:, None] & (d < D)[None, :], other=0.0)
        if ROWS > 1:
            scores = tl.dot(b_q, tl.trans(b_k), scores, input_precision=PRECISION)
        else:
            scores += tl.sum(b_q * b_k, 1)[None, :]

    image = tl.where((found >= 0)[None, :], tl.maximum(ordered(scores), 1), 0)
    chosen = _highest_of_rows(image, TOPK)
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    p_row = KEPT + (g * n + own) * TOPK
    tl.store(p_row[:, None] + place, tl.broadcast_to(found[None, :], place.shape).to(tl.int32),
             mask=chosen & (own >= 0)[:, None])  # fmt: skip
    room = tl.arange(0, BLOCK_K)
    missing = room[None, :] >= tl.sum(chosen.to(tl.int32), 1)[:, None]
    none = tl.full((ROWS, BLOCK_K), -1, tl.int32)
    tl.store(p_row[:, None] + room[None, :], none, mask=missing & (room < TOPK)[None, :] & (own >= 0)[:, None])

    if WANT_INDICES:  # noqa: SIM102
        if part == 0:
            p_indices = INDICES + (g * n_above + parent) * (N_KEPT * BLOCK + n_inherited)
            b_indices = tl.where(found < 0, n_all - 1, found + first).to(tl.int32)
            tl.store(p_indices + lane, b_indices, mask=lane < N_KEPT * BLOCK)
            if INHERITS:
                ancestor = tl.load(PLACE + parent) // BLOCK
                p_from = INDICES_ABOVE + (g * n_above2 + ancestor) * n_inherited
                for start in range(0, n_inherited, LANES):
                    m = start + lane < n_inherited
                    b_indices = tl.load(p_from + start + lane, mask=m, other=0)
                    tl.store(p_indices + N_KEPT * BLOCK + start + lane, b_indices, mask=m)


@triton.jit
def _highest_of_rows(image, n: tl.constexpr):
    """Mask of the n highest elements of each row, ties broken by index; 0 = no element.

    The n-th value is found by removing the maximum n - 1 times if n is small, otherwise by a binary search over its
    bits as in ``block_select_triton`` for one row, with all 32 bits, because the rows need different ones.
    """
    if n <= 16:
        after = image.shape[1] - 1 - tl.arange(0, image.shape[1])
        key = tl.where(image > 0, (image.to(tl.uint64) << 32) | after.to(tl.uint64)[None, :], 0)  # distinct keys
        least = tl.max(key, 1)
        for _ in range(n - 1):
            least = tl.max(tl.where(key < least[:, None], key, 0), 1)
        return (key >= least[:, None]) & (image > 0)
    bit = tl.full([], 0x80000000, tl.uint32)
    none = tl.full([], 0, tl.uint32)
    least = tl.zeros((image.shape[0],), tl.uint32)
    while bit > none:
        trial = least | bit
        count = tl.sum((image >= trial[:, None]).to(tl.int32), 1)
        least = tl.where(count >= n, trial, least)
        bit = bit >> 1
    higher = image > least[:, None]
    tie = (image == least[:, None]) & (image > 0)
    room = n - tl.sum(higher.to(tl.int32), 1)
    return higher | (tie & (tl.cumsum(tie.to(tl.int32), 1) <= room[:, None]))
