"""Window attention with any backend, shared by CLEAR and GNA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.reference import tile_attention
from dit_accel.kernels.windows.geometry import BallAxis, NeighborhoodAxis, window_tiles

from ._common import global_rows, global_tiles, mask_bias, zero_masked
from ._inputs import AttentionInputs

if TYPE_CHECKING:
    from dit_accel.kernels.block_sparse.backward import Gradients
    from dit_accel.kernels.block_sparse.plan import BlockPlan

__all__ = ["window_attention", "window_attention_backward"]

Axes = tuple[NeighborhoodAxis | BallAxis, ...]
Pooled = tuple[Tensor, Tensor, Tensor | None]
FLEX_VOLUMES = ((128, 128),)  # FlexAttention's own blocks


def window_attention(
    backend: str, inputs: AttentionInputs, axes: Axes, limit: float, pooled: Pooled | None = None
) -> Any:
    """Attention in the window described by the axes. Grid queries also attend to the keys of ``pooled``: pooled_key,
    pooled_value and pooled_mask, which is None without a padding mask. Triton also returns the log-sum-exp."""
    query, key, value, key_mask, _, layout, scale = inputs
    if backend == "torch":
        return _by_tiles(inputs, axes, limit, pooled)
    from dit_accel.kernels.block_sparse.plan import cheapest_window_plan

    more = {"scale": scale, "before": (layout.before, layout.before), "key_mask": key_mask, "pooled": pooled}
    if backend == "flex":
        from dit_accel.kernels.block_sparse.flex import block_sparse_flex

        plan = cheapest_window_plan(axes, limit, FLEX_VOLUMES, query.device)
        return block_sparse_flex(query, key, value, plan, **more)  # type: ignore[arg-type]
    from dit_accel.kernels.block_sparse.forward import block_sparse_attention

    return block_sparse_attention(query, key, value, _triton_plan(query, axes, limit), return_lse=True, **more)  # type: ignore[arg-type]


def window_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: AttentionInputs,
    axes: Axes,
    limit: float,
    pooled: Pooled | None = None,
) -> Gradients:
    """Gradients of :func:`window_attention` with Triton, from its output and log-sum-exp."""
    query, key, value, key_mask, _, layout, scale = inputs
    from dit_accel.kernels.block_sparse.backward import block_sparse_attention_backward

    plan, before = _triton_plan(query, axes, limit), (layout.before, layout.before)
    return block_sparse_attention_backward(
        grad, out, lse, query, key, value, plan, scale=scale, before=before, key_mask=key_mask, pooled=pooled
    )


def _triton_plan(query: Tensor, axes: Axes, limit: float) -> BlockPlan:
    from dit_accel.kernels.block_sparse.forward import check_inputs, tile_volumes
    from dit_accel.kernels.block_sparse.plan import cheapest_window_plan

    check_inputs(query)
    kind = "ball" if any(isinstance(axis, BallAxis) for axis in axes) else "interval"
    return cheapest_window_plan(axes, limit, tile_volumes(query, kind), query.device)


def _by_tiles(inputs: AttentionInputs, axes: Axes, limit: float, pooled: Pooled | None) -> Tensor:
    query, key, value, key_mask, _, layout, scale = inputs
    others = global_rows(layout)
    key, value, bias = zero_masked(key, key_mask), zero_masked(value, key_mask), mask_bias(key_mask)
    if pooled:
        others += ((layout.seq_len, layout.seq_len + pooled[0].shape[2]),)
        key, value = (torch.cat(pair, 2) for pair in ((key, pooled[0]), (value, pooled[1])))
        if bias is not None:
            bias = torch.cat([bias, mask_bias(pooled[2])], 1)  # type: ignore[list-item]
    plan = window_tiles(axes, limit, layout.before, others, query.device) + global_tiles(layout, query.device)
    return tile_attention(query, key, value, plan, scale=scale, key_bias=bias, may_have_empty_rows=bias is not None)
