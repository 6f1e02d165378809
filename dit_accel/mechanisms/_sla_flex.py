"""SLA's softmax over the critical blocks with torch's FlexAttention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout

from ._sla_triton import block_tilings

if TYPE_CHECKING:
    from .sla import SLAAttnProcessor

__all__ = ["critical_by_flex"]


def critical_by_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    chosen: Tensor,
    kept: Tensor,
    *,
    layout: TokenLayout,
    scale: float,
    options: SLAAttnProcessor,
) -> Tensor:
    """Softmax attention of each query block over its critical blocks and the global tokens; global queries attend to
    all.

    Args:
        query, key, value: (B, H, S, D).
        chosen: (B*H, query blocks, n) key blocks. kept: (1|B, n) bool, the valid entries, which come first.
    """
    from dit_accel.kernels.block_sparse.flex import block_sparse_flex
    from dit_accel.kernels.block_sparse.plan import BlockPlan

    q, kv = block_tilings(layout, options.block_q, options.block_kv, options.tile_order)
    counts = kept.sum(-1, dtype=torch.int32).repeat_interleave(len(chosen) // len(kept))
    plan = BlockPlan(q, kv, chosen.int(), None, counts[:, None].expand(-1, q.n_tiles))
    before = (layout.before, layout.before)
    return block_sparse_flex(query, key, value, plan, scale=scale, before=before, key_mask=key_mask)
