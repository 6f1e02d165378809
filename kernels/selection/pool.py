"""Means of tiles of tokens, in Triton; memory bound."""

# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import next_power_of_2
from ..tiling import Tiling
from ..tiling_triton import tile_size, tile_tokens

__all__ = ["mask_arguments", "pool_blocks", "pool_pair"]


def pool_blocks(x: Tensor, tiling: Tiling, before: int, key_mask: Tensor | None = None) -> Tensor:
    """Mean over the valid tokens of each tile. [SLA, arXiv 2509.24006: Q_i, K_j pooled]

    Args:
        x: (B, H, S, D), any floating dtype, any strides, D at most 256.
        tiling: the tiles; grid token i is row ``before + i``.
        before: rows in front of the grid.
        key_mask: (B, S) bool, True = valid; masked rows are never read. None = all are valid.
    Returns: (B, H, M, D) float32; a tile without a valid token is 0.
    """
    return _launch_pool(x, x, tiling, None, before, key_mask)[0]


def pool_pair(
    query: Tensor, key: Tensor, q_tiling: Tiling, k_tiling: Tiling, before: int, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`pool_blocks` of query and key in one launch.

    Args:
        query, key: (B, H, S, D) of one shape; any floating dtype, any strides.
        q_tiling, k_tiling: tilings of the same grid.
        before, key_mask: as in :func:`pool_blocks`.
    Returns: (B, H, Mq, D) and (B, H, Mk, D) float32.
    Raises: ValueError: tilings of different grids.
    """
    if q_tiling.grid != k_tiling.grid:
        raise ValueError(f"q_tiling and k_tiling must cut one grid, got {q_tiling.grid} and {k_tiling.grid}")
    return _launch_pool(query, key, q_tiling, k_tiling, before, key_mask)


def mask_arguments(key_mask: Tensor | None, like: Tensor) -> tuple[Tensor, int, int, bool]:
    """Kernel arguments of a (1|B, S) bool mask: a uint8 tensor, the strides of its two axes, whether there is a mask.

    ``like`` gives B, and is a placeholder for the tensor if there is no mask.
    """
    if key_mask is None:
        return like, 0, 0, False
    key_mask = key_mask.expand(like.shape[0], -1).view(torch.uint8)
    return key_mask, key_mask.stride(0), key_mask.stride(1), True


def _launch_pool(
    query: Tensor, key: Tensor, q_tiling: Tiling, k_tiling: Tiling | None, before: int, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, heads, _, dim = query.shape
    n_q, n_k = q_tiling.n_tiles, 0 if k_tiling is None else k_tiling.n_tiles
    k_tiling = k_tiling or q_tiling
    pooled_q, pooled_k = (
        torch.empty(batch, heads, n, dim, dtype=torch.float32, device=query.device) for n in (n_q, n_k)
    )
    block_d = next_power_of_2(dim)
    lanes = next_power_of_2(max(q_tiling.volume, k_tiling.volume if n_k else 0))
    block_n = min(lanes, max(16, 8192 // block_d))
    mask, mask_b, mask_s, has_key_mask = mask_arguments(key_mask, query)
    _pool_pair_fwd_kernel[(batch * heads * (n_q + n_k),)](
        query,
        key,
        mask,
        pooled_q,
        pooled_k,
        heads,
        n_q,
        n_k,
        before,
        *query.stride(),
        *key.stride(),
        mask_b,
        mask_s,
        *q_tiling.grid,
        *q_tiling.box,
        *k_tiling.box,
        HEADS_LAST=query.stride(1) < query.stride(2),
        D=dim,
        HAS_KEY_MASK=has_key_mask,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=max(
            1, block_n * block_d // 4096
        ),  # 16 loads of 16 bytes per thread: few threads, because each computes its rows
    )
    return pooled_q, pooled_k


@triton.jit
def _pool_pair_fwd_kernel(
    q_ptr,
    k_ptr,
    key_mask_ptr,
    pooled_q_ptr,
    pooled_k_ptr,
    n_heads,
    n_q,
    n_k,
    before,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_mb,
    stride_ms,
    G0,
    G1,
    G2,
    QB0: tl.constexpr,
    QB1: tl.constexpr,
    QB2: tl.constexpr,
    KB0: tl.constexpr,
    KB1: tl.constexpr,
    KB2: tl.constexpr,
    HEADS_LAST: tl.constexpr,
    D: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean of one tile of one head per program: query tiles first, then key tiles. HEADS_LAST: heads are adjacent in
    memory, so that concurrent programs process the same tile of different heads."""
    n_tiles = n_q + n_k
    if HEADS_LAST:
        i_h = (tl.program_id(0) % n_heads).to(tl.int64)
        rest = tl.program_id(0) // n_heads
        tile = rest % n_tiles
        i_b = (rest // n_tiles).to(tl.int64)
        i_g = i_b * n_heads + i_h
    else:
        tile = tl.program_id(0) % n_tiles
        i_g = (tl.program_id(0) // n_tiles).to(tl.int64)
        i_b = i_g // n_heads
        i_h = i_g % n_heads
    m_ptr = key_mask_ptr + i_b * stride_mb
    cols = tl.arange(0, BLOCK_D)
    if tile < n_q:
        p_x = q_ptr + i_b * stride_qb + i_h * stride_qh
        mean = _box_mean(
            p_x, stride_qs, stride_qd, m_ptr, stride_ms, tile, before, G0, G1, G2,
            QB0, QB1, QB2, D, HAS_KEY_MASK, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        tl.store(pooled_q_ptr + (i_g * n_q + tile) * D + cols, mean, mask=cols < D)
    else:
        tile -= n_q
        p_x = k_ptr + i_b * stride_kb + i_h * stride_kh
        mean = _box_mean(
            p_x, stride_ks, stride_kd, m_ptr, stride_ms, tile, before, G0, G1, G2,
            KB0, KB1, KB2, D, HAS_KEY_MASK, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        tl.store(pooled_k_ptr + (i_g * n_k + tile) * D + cols, mean, mask=cols < D)


@triton.jit
def _box_mean(
    x_ptr,
    stride_s,
    stride_d,
    m_ptr,
    stride_ms,
    tile,
    before,
    G0,
    G1,
    G2,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean of the valid tokens of a tile, (BLOCK_D,) float32; 0 if it has none."""
    cols = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    count = tile_size(tile, G0, G1, G2, B0, B1, B2)
    if HAS_KEY_MASK:
        count *= 0
    for start in range(0, B0 * B1 * B2, BLOCK_N):
        index, inside = tile_tokens(tile, start + tl.arange(0, BLOCK_N), G0, G1, G2, B0, B1, B2)
        rows = (before + index).to(tl.int64)
        if HAS_KEY_MASK:
            inside = inside & (tl.load(m_ptr + rows * stride_ms, mask=inside, other=0) != 0)
        # (BLOCK_N, BLOCK_D)
        p_x = x_ptr + rows[:, None] * stride_s + cols[None, :].to(tl.int64) * stride_d
        b_x = tl.load(p_x, mask=inside[:, None] & (cols < D)[None, :], other=0.0)
        total += tl.sum(b_x.to(tl.float32), 0)
        if HAS_KEY_MASK:
            count += tl.sum(inside.to(tl.int32), 0)
    return total / tl.maximum(count, 1)
