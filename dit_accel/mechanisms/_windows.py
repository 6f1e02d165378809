"""Windows on the block-sparse kernels: what CLEAR and GNA share."""

from __future__ import annotations

from torch import Tensor

from dit_accel.kernels.window import BallAxis, NeighborhoodAxis
from dit_accel.layout import TokenLayout

__all__ = ["window_attention_flex", "window_attention_triton"]

Extra = tuple[Tensor, Tensor, Tensor | None]
FLEX_VOLUMES = ((128, 128),)  # FlexAttention's own


def window_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    axes: tuple[NeighborhoodAxis | BallAxis, ...],
    limit: float,
    layout: TokenLayout,
    scale: float,
    extra: Extra | None = None,
) -> Tensor:
    """Attention in the window that the axes describe; grid queries see the keys of ``extra``, too."""
    from dit_accel.kernels.block_plan import cheapest_window_plan
    from dit_accel.kernels.block_sparse_triton import block_sparse_attention, check_inputs, tile_volumes

    check_inputs(query)
    kind = "ball" if any(isinstance(axis, BallAxis) for axis in axes) else "interval"
    plan = cheapest_window_plan(axes, limit, tile_volumes(query, kind), query.device)
    before = (layout.before, layout.before)
    return block_sparse_attention(
        query, key, value, plan, scale=scale, before=before, real=key_padding_mask, extra=extra
    )[0]


def window_attention_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    axes: tuple[NeighborhoodAxis | BallAxis, ...],
    limit: float,
    layout: TokenLayout,
    scale: float,
    extra: Extra | None = None,
) -> Tensor:
    """The same by torch's FlexAttention."""
    from dit_accel.kernels.block_plan import cheapest_window_plan
    from dit_accel.kernels.block_sparse_flex import block_sparse_flex

    plan = cheapest_window_plan(axes, limit, FLEX_VOLUMES, query.device)
    before = (layout.before, layout.before)
    return block_sparse_flex(query, key, value, plan, scale=scale, before=before, real=key_padding_mask, extra=extra)
