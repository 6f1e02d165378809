"""SLA on the Triton kernels: pool and select, sum up the linear branch, then one pass over the critical blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout

from ._boxes import box_blocks, box_shape

if TYPE_CHECKING:
    from dit_accel.kernels.tiling import Tiling

__all__ = ["block_tilings", "sla_attention_triton"]


def sla_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    layout: TokenLayout,
    scale: float,
    critical: float,
    negligible: float,
    block_q: int,
    block_kv: int,
    feature_map: str,
    linear_over: str,
    smooth_key: bool,
    tile_order: bool,
) -> Tensor:
    """``sla_attention`` on a GPU. ``smooth_key`` moves all scores of a query block alike, so it changes no choice."""
    from dit_accel.kernels.block_linear_triton import linear_state, marginal_linear_state
    from dit_accel.kernels.block_plan import BlockPlan
    from dit_accel.kernels.block_pool_triton import pool_pair
    from dit_accel.kernels.block_select_triton import select_blocks
    from dit_accel.kernels.block_sparse_triton import LinearBranch, block_sparse_attention, check_inputs

    check_inputs(query)
    batch, heads = query.shape[:2]
    q, kv = block_tilings(layout, block_q, block_kv, tile_order)
    before, n_blocks, real = layout.before, kv.n_tiles, key_padding_mask
    marginal_only = weight is not None and linear_over == "marginal"
    most, least = max(1, int(critical * n_blocks)), int(negligible * n_blocks)
    counts: tuple[int | Tensor, int | Tensor] = (most, least)
    filled = None
    if real is not None:
        filled = _filled_blocks(real[:, layout.grid_slice], kv)
        n_filled = filled.sum(-1).double()
        counts = ((critical * n_filled).int().clamp(min=1), (negligible * n_filled).int())
    pooled_q, pooled_k = pool_pair(query, key, q, kv, before, real)
    lists, marginal = select_blocks(
        pooled_q, pooled_k, *counts, filled, marginal_only, map_dtype=query.dtype, n_max=most
    )
    shape = (batch * heads, q.n_tiles)
    if isinstance(counts[0], Tensor):
        n_tiles = counts[0].repeat_interleave(heads)[:, None].expand(shape).contiguous()
    else:
        n_tiles = torch.full(shape, most, dtype=torch.int32, device=query.device)
    branch = None
    if weight is not None and marginal is not None:
        n_marginal = max(1, n_blocks - most - least)
        sums = marginal_linear_state(marginal, key, value, kv, before, feature_map, weight, real, n_marginal)
        branch = LinearBranch(*sums, bias, feature_map)
    elif weight is not None:
        state = linear_state(key, value, before, layout.grid_len, feature_map, weight, real, query.dtype)
        whole, norm = (x.flatten(0, 1)[:, None] for x in (state.state, state.norm))
        branch = LinearBranch(whole, norm, state.eps, bias, feature_map)
    elif bias is not None:
        branch = LinearBranch(None, None, None, bias, feature_map)
    plan = BlockPlan(q, kv, lists, None, n_tiles)
    return block_sparse_attention(
        query, key, value, plan, scale=scale, before=(before, before), real=real, linear=branch
    )[0]


def block_tilings(layout: TokenLayout, block_q: int, block_kv: int, tile_order: bool) -> tuple[Tiling, Tiling]:
    """The grid in blocks of queries, and in blocks of keys."""
    from dit_accel.kernels.tiling import Tiling

    grid = layout.grid if tile_order else (layout.grid_len,)
    return Tiling.of(grid, box_shape(block_q, grid)), Tiling.of(grid, box_shape(block_kv, grid))


def _filled_blocks(real: Tensor, kv: Tiling) -> Tensor:
    """(B, M) bool: blocks that hold a real token, of a mask (B, N) of the grid."""
    grid = kv.grid if kv.grid[:2] != (1, 1) else kv.grid[2:]
    box = kv.box[-len(grid) :]
    table, _ = box_blocks(grid, box, real.device)
    return ((table >= 0) & real[:, table]).any(-1)
