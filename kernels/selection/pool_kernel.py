# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernel of ``selection/pool.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention_kernel import attended, head_of, load_rows
from ..tiling_kernel import tile_size, tile_tokens

__all__ = ["pool_pair_fwd_kernel"]


@triton.jit
def _tile_mean(
    x, key_mask, b, h, tile, tokens, BOX: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Mean of the valid tokens of a tile, (BLOCK_D,) float32; 0 if it has none."""
    p_x, d = head_of(x, b, h), tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = tile_size(tile, tokens, BOX)
    if key_mask.data is not None:
        count *= 0
    for start in range(0, BOX[0] * BOX[1] * BOX[2], BLOCK_N):
        index, valid = tile_tokens(tile, start + tl.arange(0, BLOCK_N), tokens, BOX)
        row = tokens.before + index
        valid = attended(key_mask, b, row, valid)
        # (BLOCK_N, BLOCK_D)
        b_x = load_rows(p_x, row, valid, x.row, d, D, True)
        total += tl.sum(b_x.to(tl.float32), 0)
        if key_mask.data is not None:
            count += tl.sum(valid.to(tl.int32), 0)
    return total / tl.maximum(count, 1)


@triton.jit
def pool_pair_fwd_kernel(
    query, key, p_pooled_q, p_pooled_k, key_mask, n_heads, n_q, n_k, tokens, QB: tl.constexpr, KB: tl.constexpr,
    HEADS_LAST: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean of one tile of one head per program: query tiles first, then key tiles. HEADS_LAST: heads are adjacent in
    memory, so that concurrent programs process the same tile of different heads."""
    n_tiles = n_q + n_k
    if HEADS_LAST:
        h = (tl.program_id(0) % n_heads).to(tl.int64)
        rest = tl.program_id(0) // n_heads
        tile = rest % n_tiles
        b = (rest // n_tiles).to(tl.int64)
        bh = b * n_heads + h
    else:
        tile = tl.program_id(0) % n_tiles
        bh = (tl.program_id(0) // n_tiles).to(tl.int64)
        b, h = bh // n_heads, bh % n_heads
    d = tl.arange(0, BLOCK_D)
    if tile < n_q:
        mean = _tile_mean(query, key_mask, b, h, tile, tokens, QB, D, BLOCK_N, BLOCK_D)
        tl.store(p_pooled_q + (bh * n_q + tile) * D + d, mean, mask=d < D)
    else:
        tile -= n_q
        mean = _tile_mean(key, key_mask, b, h, tile, tokens, KB, D, BLOCK_N, BLOCK_D)
        tl.store(p_pooled_k + (bh * n_k + tile) * D + d, mean, mask=d < D)
