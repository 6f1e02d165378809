"""Attention in a window by any backend: what CLEAR and GNA share."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import tile_attention
from dit_accel.kernels.window import BallAxis, NeighborhoodAxis, window_tiles
from dit_accel.layout import TokenLayout

from ._common import global_rows, global_tiles, hidden_bias, hide

__all__ = ["window_attention"]

Axes = tuple[NeighborhoodAxis | BallAxis, ...]
Extra = tuple[Tensor, Tensor, Tensor | None]
FLEX_VOLUMES = ((128, 128),)  # FlexAttention's own blocks


def window_attention(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    axes: Axes,
    limit: float,
    layout: TokenLayout,
    scale: float,
    extra: Extra | None = None,
) -> Tensor:
    """Attention in the window that the axes describe; grid queries see the keys of ``extra``, too (keys, values, and
    which are real or None where there is no padding mask)."""
    if backend == "torch":
        return _by_tiles(query, key, value, key_padding_mask, axes, limit, layout, scale, extra)
    from dit_accel.kernels.block_plan import cheapest_window_plan

    more = {"scale": scale, "before": (layout.before, layout.before), "real": key_padding_mask, "extra": extra}
    if backend == "flex":
        from dit_accel.kernels.block_sparse_flex import block_sparse_flex

        plan = cheapest_window_plan(axes, limit, FLEX_VOLUMES, query.device)
        return block_sparse_flex(query, key, value, plan, **more)  # type: ignore[arg-type]
    from dit_accel.kernels.block_sparse_triton import block_sparse_attention, check_inputs, tile_volumes

    check_inputs(query)
    kind = "ball" if any(isinstance(axis, BallAxis) for axis in axes) else "interval"
    plan = cheapest_window_plan(axes, limit, tile_volumes(query, kind), query.device)
    return block_sparse_attention(query, key, value, plan, **more)[0]  # type: ignore[arg-type]


def _by_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    axes: Axes,
    limit: float,
    layout: TokenLayout,
    scale: float,
    extra: Extra | None,
) -> Tensor:
    others = global_rows(layout)
    key, value, bias = hide(key, real), hide(value, real), hidden_bias(real)
    if extra:
        others += ((layout.seq_len, layout.seq_len + extra[0].shape[2]),)
        key, value = (torch.cat(pair, 2) for pair in ((key, extra[0]), (value, extra[1])))
        if bias is not None:
            bias = torch.cat([bias, hidden_bias(extra[2])], 1)  # type: ignore[list-item]
    plan = window_tiles(axes, limit, layout.before, others, query.device) + global_tiles(layout, query.device)
    return tile_attention(query, key, value, plan, scale=scale, key_bias=bias, hides=bias is not None)
