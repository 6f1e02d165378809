"""SLA with the Triton kernels: pool and select, sum the linear branch, then one pass over the critical blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout

from ._boxes import box_blocks, box_shape
from ._inputs import AttentionInputs

if TYPE_CHECKING:
    from dit_accel.kernels.block_linear.forward import LinearState
    from dit_accel.kernels.block_sparse.plan import BlockPlan
    from dit_accel.kernels.tiling import Tiling

    from .sla import SLAAttnProcessor

__all__ = ["block_tilings", "sla_attention_triton", "sla_attention_triton_backward"]


def sla_attention_triton(inputs: AttentionInputs, options: SLAAttnProcessor) -> tuple[Tensor, Tensor]:
    """``sla_attention`` on a GPU, and its log-sum-exp (B, H, S) float32."""
    from dit_accel.kernels.block_sparse.forward import LinearBranch, block_sparse_attention

    query, key, value, key_mask, (weight, bias), layout, scale = inputs
    before = layout.before
    marginal_only = weight is not None and options.linear_over == "marginal"
    chosen = _make_selection(query, key, key_mask, layout, marginal_only, options)
    branch = None
    if weight is not None:
        sums = _sums(key, value, key_mask, layout, chosen, options.feature_map, weight)
        state, norm = sums.state.flatten(0, -4), sums.norm.flatten(0, -3)
        branch = LinearBranch(state, norm, sums.eps, bias, options.feature_map)
    elif bias is not None:
        branch = LinearBranch(None, None, None, bias, options.feature_map)
    return block_sparse_attention(
        query,
        key,
        value,
        chosen.plan,
        scale=scale,
        before=(before, before),
        key_mask=key_mask,
        linear=branch,
        return_lse=True,
    )  # type: ignore[return-value]


def sla_attention_triton_backward(
    grad: Tensor, out: Tensor, lse: Tensor, inputs: AttentionInputs, options: SLAAttnProcessor
) -> list[Tensor]:
    """Gradients of query, key, value, and of weight and bias if they are given. The selection is cheap and is
    recomputed, bitwise equal to the forward pass."""
    from dit_accel.kernels.block_linear.backward import linear_backward
    from dit_accel.kernels.block_sparse.backward import block_sparse_attention_backward

    query, key, value, key_mask, (weight, bias), layout, scale = inputs
    before = layout.before
    if key_mask is not None:  # a row without a visible key has no linear part
        grad = torch.where((lse > -torch.inf)[..., None], grad, 0)
    marginal_only = weight is not None and options.linear_over == "marginal"
    chosen = _make_selection(query, key, key_mask, layout, marginal_only, options)
    plan = chosen.plan
    linear_delta, added, learned = None, None, []
    if weight is not None:
        sums = _sums(key, value, key_mask, layout, chosen, options.feature_map, None)
        linear = linear_backward(
            grad, query, key, value, sums, weight, options.feature_map, plan.q, plan.kv, before, key_mask,
            chosen.marginal, chosen.n_marginal,
        )  # fmt: skip
        linear_delta, added = linear.delta, linear[:3]
        learned.append(linear.weight.to(weight.dtype))
    found = block_sparse_attention_backward(
        grad, out, lse, query, key, value, plan, scale=scale, before=(before, before), key_mask=key_mask,
        linear_delta=linear_delta, bias=bias, added=added,
    )  # fmt: skip
    if bias is not None and found.bias is not None:
        learned.append(found.bias.to(bias.dtype))
    return [*found[:3], *learned]


class _Selection(NamedTuple):
    """Plan of the critical blocks, map of the marginal ones if requested, and their approximate number per row."""

    plan: BlockPlan
    marginal: Tensor | None
    n_marginal: int


def _make_selection(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    layout: TokenLayout,
    want_marginal: bool,
    options: SLAAttnProcessor,
) -> _Selection:
    """Select critical and marginal blocks. ``smooth_key`` has no effect: it moves all scores of a query block by the
    same amount."""
    from dit_accel.kernels.block_sparse.forward import check_inputs
    from dit_accel.kernels.block_sparse.plan import BlockPlan
    from dit_accel.kernels.selection.pool import pool_pair
    from dit_accel.kernels.selection.select import select_blocks

    check_inputs(query)
    batch, heads = query.shape[:2]
    q, kv = block_tilings(layout, options.block_q, options.block_kv, options.tile_order)
    n_blocks = kv.n_tiles
    most, least = max(1, int(options.critical * n_blocks)), int(options.negligible * n_blocks)
    counts: tuple[int | Tensor, int | Tensor] = (most, least)
    valid_blocks = None
    if key_mask is not None:
        valid_blocks = _valid_blocks(key_mask[:, layout.grid_slice], kv)
        n_valid = valid_blocks.sum(-1).double()
        counts = ((options.critical * n_valid).int().clamp(min=1), (options.negligible * n_valid).int())
    pooled_q, pooled_k = pool_pair(query, key, q, kv, layout.before, key_mask)
    lists, marginal = select_blocks(
        pooled_q, pooled_k, *counts, valid_blocks, want_marginal, map_dtype=query.dtype, n_max=most
    )
    shape = (batch * heads, q.n_tiles)
    if isinstance(counts[0], Tensor):
        n_tiles = counts[0].repeat_interleave(heads)[:, None].expand(shape).contiguous()
    else:
        n_tiles = torch.full(shape, most, dtype=torch.int32, device=query.device)
    return _Selection(BlockPlan(q, kv, lists, None, n_tiles), marginal, max(1, n_blocks - most - least))


def _sums(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    layout: TokenLayout,
    chosen: _Selection,
    feature_map: str,
    weight: Tensor | None,
) -> LinearState:
    """Sums of the linear branch, with the projection if it is given, in the keys' dtype: (B, H, 1, D, D) over all keys,
    or (B*H, query blocks, D, D) over marginal blocks."""
    from dit_accel.kernels.block_linear.forward import LinearState, linear_state, marginal_linear_state

    more = (feature_map, weight, key_mask)
    if chosen.marginal is not None:
        kv = chosen.plan.kv
        return marginal_linear_state(chosen.marginal, key, value, kv, layout.before, *more, chosen.n_marginal)
    state, norm, eps = linear_state(key, value, layout.before, layout.grid_len, *more, key.dtype)
    return LinearState(state[:, :, None], norm[:, :, None], eps)


def block_tilings(layout: TokenLayout, block_q: int, block_kv: int, tile_order: bool) -> tuple[Tiling, Tiling]:
    """Tilings of the grid for queries and for keys."""
    from dit_accel.kernels.tiling import Tiling

    grid = layout.grid if tile_order else (layout.grid_len,)
    return Tiling.of(grid, box_shape(block_q, grid)), Tiling.of(grid, box_shape(block_kv, grid))


def _valid_blocks(key_mask: Tensor, kv: Tiling) -> Tensor:
    """Blocks with a valid token, (B, M) bool, for a mask (B, N) of the grid."""
    grid = kv.grid if kv.grid[:2] != (1, 1) else kv.grid[2:]
    box = kv.box[-len(grid) :]
    table, _ = box_blocks(grid, box, key_mask.device)
    return ((table >= 0) & key_mask[:, table]).any(-1)
