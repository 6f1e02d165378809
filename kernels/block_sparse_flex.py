"""The attention of ``block_sparse_triton.py`` by torch's FlexAttention: a portable path, and a check of the kernels.

FlexAttention's blocks are runs of the sequence. So queries and keys are put in the order of the plan's boxes, padded to
whole boxes, with the tokens off the grid behind them and the pooled ones last; the result is put back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .block_plan import BlockPlan
from .tiling import Tiling

__all__ = ["FlexMask", "block_sparse_flex", "flex_mask"]

OFF_GRID, POOLED, NOTHING = -1, -2, -3  # in the place of a place


@dataclass(frozen=True, eq=False)
class FlexMask:
    """A block mask, and the order that it is for.

    block_mask: over queries and keys in that order.
    query_rows, key_rows: (Lq,), (Lk,) row in the sequence of each token in order; pooled tokens come after the
        sequence's own; -1 = padding.
    """

    block_mask: BlockMask
    query_rows: Tensor
    key_rows: Tensor


def block_sparse_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    before: tuple[int, int] = (0, 0),
    real: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Tensor:
    """As :func:`~dit_accel.kernels.block_sparse_triton.block_sparse_attention`, without a linear branch.

    On a GPU compiled, once for each plan and shape; elsewhere torch's eager FlexAttention, which holds all logits.
    """
    n_extra, extra_real = (extra[0].shape[2], extra[2]) if extra else (0, None)
    lengths = (query.shape[2], key.shape[2])
    if real is None and extra_real is None:
        mask = _kept_mask(plan, lengths, before, n_extra)
    else:
        mask = flex_mask(plan, lengths, before, n_extra, real, extra_real)
    if extra:
        key, value = (torch.cat(pair, 2) for pair in ((key, extra[0]), (value, extra[1])))
    q, k, v = (_take(x, rows) for x, rows in ((query, mask.query_rows), (key, mask.key_rows), (value, mask.key_rows)))
    grouped = q.shape[1] != k.shape[1]
    attend: Any = _compiled() if q.device.type == "cuda" else flex_attention
    ordered = attend(q, k, v, block_mask=mask.block_mask, scale=scale, enable_gqa=grouped)
    kept = mask.query_rows >= 0
    out = torch.empty_like(query)
    out[:, :, mask.query_rows[kept]] = ordered[:, :, kept]
    return out


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """(B, H, L, D) in order; padding is 0."""
    return x[:, :, rows.clamp(min=0)].masked_fill((rows < 0)[:, None], 0)


def flex_mask(
    plan: BlockPlan,
    lengths: tuple[int, int],
    before: tuple[int, int] = (0, 0),
    n_extra: int = 0,
    real: Tensor | None = None,
    extra_real: Tensor | None = None,
) -> FlexMask:
    """The block mask of a plan.

    Args:
        plan: boxes and lists, one list for all heads.
        lengths: of queries and keys, tokens off the grid included.
        before: tokens in front of the grid, among queries and among keys.
        n_extra: pooled tokens, which grid queries see.
        real, extra_real: (B, lengths[1]) and (B, n_extra) bool, False hides a key.
    Raises: ValueError: lists that differ by head (SLA).
    """
    if plan.tiles.shape[0] != 1:
        raise ValueError(f"FlexAttention takes one list for all heads, got lists for {plan.tiles.shape[0]} (SLA's)")
    query_rows, query_places = _order(plan, plan.q, lengths[0], before[0], 0)
    key_rows, key_places = _order(plan, plan.kv, lengths[1], before[1], n_extra)
    if real is not None or extra_real is not None:
        batch = len(real if real is not None else extra_real)  # type: ignore[arg-type]
        parts = [
            torch.ones(batch, n, dtype=torch.bool, device=key_rows.device) if x is None else x.expand(batch, -1)
            for x, n in ((real, lengths[1]), (extra_real, n_extra))
        ]
        real = torch.cat(parts, 1)[:, key_rows.clamp(min=0)]
    blocks = _block_lists(plan, len(query_rows), len(key_rows), whole=real is None)
    sees = _rule(plan, query_places, key_places, real)
    sides = (plan.q.volume, plan.kv.volume)
    mask = BlockMask.from_kv_blocks(
        *blocks, BLOCK_SIZE=sides, mask_mod=sees, seq_lengths=(len(query_rows), len(key_rows))
    )
    return FlexMask(mask, query_rows, key_rows)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _kept_mask(plan: BlockPlan, lengths: tuple[int, int], before: tuple[int, int], n_extra: int) -> FlexMask:
    return flex_mask(plan, lengths, before, n_extra)


def _order(plan: BlockPlan, tiling: Tiling, length: int, before: int, n_extra: int) -> tuple[Tensor, Tensor]:
    """(L,) rows in the sequence in the order of the boxes, and (3, L) places along the axes, or what there is instead
    of a token of the grid."""
    device = plan.tiles.device
    axes = [torch.arange(count * side, device=device) for count, side in zip(tiling.counts, tiling.box, strict=True)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    for i, (count, side) in enumerate(zip(tiling.counts, tiling.box, strict=True)):
        places = places.unflatten(2 * i + 1, (count, side))
    places = places.permute(0, 1, 3, 5, 2, 4, 6).flatten(1)
    sides = torch.tensor(tiling.grid, device=device)[:, None]
    inside = (places < sides).all(0)
    coordinates = places.clamp(max=sides - 1)
    if plan.mask is not None:  # under dilation a place is not a coordinate
        coordinates = torch.stack([table[0, x] for table, x in zip(plan.mask.tables, coordinates, strict=True)])
    x0, x1, x2 = coordinates
    rows = torch.where(inside, before + (x0 * tiling.grid[1] + x1) * tiling.grid[2] + x2, -1)
    places = places.masked_fill(~inside, NOTHING)
    own = torch.arange(length, device=device)
    off_grid = torch.cat([own[:before], own[before + tiling.n_tokens :]])
    for more, kind in ((off_grid, OFF_GRID), (length + torch.arange(n_extra, device=device), POOLED)):
        short = -len(more) % tiling.volume
        rows = torch.cat([rows, more, more.new_full((short,), -1)])
        kinds = torch.cat([torch.full_like(more, kind), more.new_full((short,), NOTHING)])
        places = torch.cat([places, kinds.expand(3, -1)], 1)
    return rows, places


def _block_lists(plan: BlockPlan, n_queries: int, n_keys: int, whole: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and lists of the key blocks that a block of queries sees in part and of those that it sees in full."""
    n_q, n_k, device = n_queries // plan.q.volume, n_keys // plan.kv.volume, plan.tiles.device
    seen = torch.ones(n_q, n_k, dtype=torch.bool, device=device)  # off the grid, and by what is off the grid
    seen[: plan.q.n_tiles, : plan.kv.n_tiles] = False
    full = torch.zeros_like(seen)
    place = torch.arange(plan.tiles.shape[2], device=device)
    for kind, counts in ((seen, plan.n_tiles), (full, plan.n_full)):
        if counts is not None:
            tile, at = (place < counts[0][:, None]).nonzero(as_tuple=True)
            kind[tile, plan.tiles[0, tile, at].long()] = True
    full &= whole
    lists = []
    for kind in (seen & ~full, full):
        counts = kind.sum(1, dtype=torch.int32)
        order = torch.argsort(kind.int(), dim=1, descending=True, stable=True).int()
        lists += [counts[None, None], order[None, None]]
    return lists[0], lists[1], lists[2], lists[3]


def _rule(plan: BlockPlan, queries: Tensor, keys: Tensor, real: Tensor | None) -> Callable[..., Tensor]:
    """FlexAttention's ``mask_mod``; places are looked up in the order of the boxes."""
    mask, q_kind, k_kind = plan.mask, queries[0], keys[0]

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = (q_kind[q] >= 0) & (k_kind[k] >= 0)
        if mask is not None:
            for axis, (inside, table) in enumerate(zip(mask.intervals, mask.tables, strict=True)):
                if inside:
                    place, other = queries[axis][q].clamp(min=0), keys[axis][k]
                    near = near & (table[1][place] <= other) & (other <= table[2][place])
            if mask.weights is not None:
                cost = sum(w * (queries[i][q] - keys[i][k]).double() ** 2 for i, w in enumerate(mask.weights) if w)
                near = near & (cost < mask.limit)
        off_grid = (q_kind[q] == OFF_GRID) & (k_kind[k] != POOLED)
        seen = near | off_grid | (k_kind[k] == OFF_GRID) | ((k_kind[k] == POOLED) & (q_kind[q] >= 0))
        seen = seen & (k_kind[k] != NOTHING)
        return seen if real is None else seen & real[b, k]

    return sees
