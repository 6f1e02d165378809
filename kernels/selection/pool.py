"""Means of tiles of tokens, in Triton; memory bound."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import Tokens, mask_of, rows_of
from ..launch import next_power_of_2
from ..tiling import Tiling
from .pool_kernel import pool_pair_fwd_kernel

__all__ = ["pool_blocks", "pool_pair"]


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


def _launch_pool(
    query: Tensor, key: Tensor, q_tiling: Tiling, k_tiling: Tiling | None, before: int, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Means of the tiles of query and key; k_tiling None = of query alone."""
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    batch, heads, length, dim = query.shape
    n_q, n_k = q_tiling.n_tiles, 0 if k_tiling is None else k_tiling.n_tiles
    k_tiling = k_tiling or q_tiling
    pooled_q, pooled_k = (
        torch.empty(batch, heads, n, dim, dtype=torch.float32, device=query.device) for n in (n_q, n_k)
    )
    block_d = next_power_of_2(dim)
    lanes = next_power_of_2(max(q_tiling.volume, k_tiling.volume if n_k else 0))
    block_n = min(lanes, max(16, 8192 // block_d))
    pool_pair_fwd_kernel[(batch * heads * (n_q + n_k),)](
        rows_of(query), rows_of(key), pooled_q, pooled_k, mask_of(key_mask), heads, n_q, n_k,
        Tokens(length, before, *q_tiling.grid), QB=q_tiling.box, KB=k_tiling.box,
        HEADS_LAST=query.stride(1) < query.stride(2), D=dim, BLOCK_N=block_n, BLOCK_D=block_d,
        # 16 loads of 16 bytes per thread: few threads, because each computes its rows
        num_warps=max(1, block_n * block_d // 4096),
    )  # fmt: skip
    return pooled_q, pooled_k
