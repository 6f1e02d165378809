# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernel of ``llsa/select.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ..selection.select_kernel import highest, ordered

__all__ = ["llsa_select_fwd_kernel"]


@triton.jit
def _tokens_of(bh, part, parent, parents, level, S: tl.constexpr):
    """Tokens (ROWS,) of a program and their candidates (LANES,), int64, -1 = none."""
    lane = tl.arange(0, S.LANES)
    slot = part * S.ROWS + tl.arange(0, S.ROWS)
    if parents.kept is None:
        slot = slot.to(tl.int64)
        own = tl.where(slot < level.length, slot, -1)
        found = tl.where(lane < level.length, lane, -1).to(tl.int64)
    else:
        p_kept = parents.kept + (bh * parents.length + parent) * S.N_KEPT + lane // S.BLOCK
        node = tl.load(p_kept, mask=lane < S.N_KEPT * S.BLOCK, other=-1)
        p_found = parents.children + node.to(tl.int64) * S.BLOCK + lane % S.BLOCK
        found = tl.load(p_found, mask=node >= 0, other=-1)
        p_own = parents.children + parent.to(tl.int64) * S.BLOCK + slot
        own = tl.load(p_own, mask=slot < S.BLOCK, other=-1)
    return own, found


@triton.jit
def _store_indices(p_indices, bh, parent, found, parents, inherited, level, S: tl.constexpr):
    """Store the indices of the candidates among all pooled tokens, followed by the inherited ones."""
    lane = tl.arange(0, S.LANES)
    n_candidates = S.N_KEPT * S.BLOCK
    p_to = p_indices + (bh * parents.length + parent) * (n_candidates + inherited.length)
    b_indices = tl.where(found < 0, level.total - 1, found + level.first).to(tl.int32)
    tl.store(p_to + lane, b_indices, mask=lane < n_candidates)
    if inherited.indices is not None:
        ancestor = tl.load(inherited.place + parent) // S.BLOCK
        p_from = inherited.indices + (bh * inherited.tokens + ancestor) * inherited.length
        for start in range(0, inherited.length, S.LANES):
            m = start + lane < inherited.length
            b_indices = tl.load(p_from + start + lane, mask=m, other=0)
            tl.store(p_to + n_candidates + start + lane, b_indices, mask=m)


@triton.jit
def llsa_select_fwd_kernel(
    p_query, p_key, p_number, p_kept, p_indices, parents, inherited, level, n_heads, S: tl.constexpr
):
    """Selection of ROWS children of one token of the level above; without a level above, of any ROWS tokens, for which
    all are candidates. p_number: numbers of valid tokens, if some may be 0."""
    if parents.kept is None:
        n_parts = tl.cdiv(level.length, S.ROWS)
        part, parent = tl.program_id(0) % n_parts, 0
        bh = (tl.program_id(0) // n_parts).to(tl.int64)
    else:
        N_PARTS: tl.constexpr = (S.BLOCK + S.ROWS - 1) // S.ROWS
        part, parent = tl.program_id(0) % N_PARTS, tl.program_id(0) // N_PARTS % parents.length
        bh = (tl.program_id(0) // (N_PARTS * parents.length)).to(tl.int64)
    own, found = _tokens_of(bh, part, parent, parents, level, S)
    if p_number is not None:
        p_found = p_number + bh // n_heads * level.total + level.first + found
        found = tl.where(tl.load(p_found, mask=found >= 0, other=0.0) > 0, found, -1)

    b_scores = tl.full((S.ROWS, S.LANES), 0.0, tl.float32)
    for start in range(0, S.D, S.BLOCK_D):
        d = start + tl.arange(0, S.BLOCK_D)
        p_q = p_query + (bh * level.length + own[:, None]) * S.D + d[None, :]
        b_q = tl.load(p_q, mask=(own >= 0)[:, None] & (d < S.D)[None, :], other=0.0)
        p_k = p_key + (bh * level.length + found[:, None]) * S.D + d[None, :]
        b_k = tl.load(p_k, mask=(found >= 0)[:, None] & (d < S.D)[None, :], other=0.0)
        if S.ROWS > 1:
            b_scores = tl.dot(b_q, tl.trans(b_k), b_scores, input_precision=S.PRECISION)
        else:
            b_scores += tl.sum(b_q * b_k, 1)[None, :]

    b_image = tl.where((found >= 0)[None, :], tl.maximum(ordered(b_scores), 1), 0)
    m_chosen = highest(b_image, S.TOPK)
    place = tl.cumsum(m_chosen.to(tl.int32), 1) - 1
    p_row = p_kept + (bh * level.length + own) * S.TOPK
    b_found = tl.broadcast_to(found[None, :], place.shape).to(tl.int32)
    tl.store(p_row[:, None] + place, b_found, mask=m_chosen & (own >= 0)[:, None])
    room = tl.arange(0, S.BLOCK_K)
    m_room = room[None, :] >= tl.sum(m_chosen.to(tl.int32), 1)[:, None]
    none = tl.full((S.ROWS, S.BLOCK_K), -1, tl.int32)
    tl.store(p_row[:, None] + room[None, :], none, mask=m_room & (room < S.TOPK)[None, :] & (own >= 0)[:, None])
    if p_indices is not None:  # noqa: SIM102
        if part == 0:
            _store_indices(p_indices, bh, parent, found, parents, inherited, level, S)
