"""The attention of ``block_sparse/forward.py`` with torch's FlexAttention: a portable backend, and a check of the
kernels.

FlexAttention's blocks are consecutive tokens. Queries and keys are therefore permuted to the order of the plan's tiles,
padded to full tiles, followed by the global tokens and the pooled ones; the output is permuted back. Tiles of a volume
that the compiled kernel cannot divide are padded to the next one that it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..tiling import Tiling
from .plan import BlockPlan, WindowMask

__all__ = ["FlexMask", "block_sparse_flex", "flex_mask"]

OFF_GRID, POOLED, NOTHING = -1, -2, -3  # kinds of token, in place of a position on the grid
LEAST_SIDE, SIDE = 16, 64  # of the compiled kernel's tiles; larger blocks are multiples of the latter
TORCHS_SIDE = 128  # a multiple of all of torch's own tile sizes
TILE_BYTES = 2**14  # bytes of keys per tile, if torch's own tile does not fit the blocks
MOST_COMPILED = 256  # shapes that a process may compile for; torch's own limit is 8


@dataclass(frozen=True, eq=False)
class FlexMask:
    """Block mask and the permutation that it applies to.

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
    key_mask: Tensor | None = None,
    pooled: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Same as :func:`~dit_accel.kernels.block_sparse.forward.block_sparse_attention`, without a linear branch.

    On a GPU it is compiled once per window and shape, or once per shape if the plan lists blocks (SLA). Elsewhere it is
    torch's eager FlexAttention, which holds all logits in memory.

    Raises: ValueError: on a GPU, a dtype or head dim that the compiled kernel does not support.
    """
    if query.device.type == "cuda":
        check_compiled(query.dtype, query.shape[-1])
    with _transforms():
        return _block_sparse_flex(query, key, value, plan, scale, before, key_mask, pooled)


def _block_sparse_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    before: tuple[int, int],
    key_mask: Tensor | None,
    pooled: tuple[Tensor, Tensor, Tensor | None] | None,
) -> Tensor:
    n_pooled, pooled_mask = (pooled[0].shape[2], pooled[2]) if pooled else (0, None)
    lengths = (query.shape[2], key.shape[2])
    if plan.mask is not None and key_mask is None and pooled_mask is None:
        mask = _kept_mask(plan, lengths, before, n_pooled)
    else:
        mask = flex_mask(plan, lengths, before, n_pooled, key_mask, pooled_mask, heads=query.shape[1])
    key, value = _zero_masked(key, key_mask), _zero_masked(value, key_mask)
    if pooled:
        key, value = (
            torch.cat([x, _zero_masked(y, pooled_mask)], 2) for x, y in ((key, pooled[0]), (value, pooled[1]))
        )
    q, k, v = (_take(x, rows) for x, rows in ((query, mask.query_rows), (key, mask.key_rows), (value, mask.key_rows)))
    grouped = q.shape[1] != k.shape[1]
    options: Any = {"block_mask": mask.block_mask, "scale": scale, "enable_gqa": grouped}
    if q.device.type == "cuda":
        options["kernel_options"] = kernel_options(mask.block_mask.BLOCK_SIZE, q.dtype, q.shape[-1])
        with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED):
            ordered = _compiled()(q, k, v, **options)
    else:
        ordered = flex_attention(q, k, v, **options)
    kept = mask.query_rows >= 0
    out = torch.empty_like(query)
    out[:, :, mask.query_rows[kept]] = ordered[:, :, kept]
    return out


@contextmanager
def _transforms() -> Iterator[None]:
    """Enable vmap inside an operator, which FlexAttention needs: when a compiled graph calls the operator for the first
    time, torch traces it with the dispatch keys above its own excluded."""
    above = ("FuncTorchBatched", "FuncTorchVmapMode", "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode")
    with ExitStack() as stack:
        for key in (*above, "FuncTorchGradWrapper", "Functionalize", "PythonTLSSnapshot", "PreDispatch"):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(getattr(torch._C.DispatchKey, key), False))
        yield


@cache
def _compiled() -> Callable[..., Tensor]:
    # fullgraph raises if compilation fails; otherwise eager mode would run and hold all logits
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def check_compiled(dtype: torch.dtype, dim: int) -> None:
    """Raises: ValueError: a dtype or head dim that compiled FlexAttention does not support."""
    if dtype == torch.float64:
        raise ValueError(
            "FlexAttention on a GPU supports float16, bfloat16 and float32, got float64: "
            'convert query, key and value, or choose backend="torch"'
        )
    if dim < LEAST_SIDE:
        raise ValueError(
            f"FlexAttention on a GPU supports head dims from {LEAST_SIDE}, got {dim}: pad query, key and value with "
            'zeros to it and give scale, or choose backend="torch"'
        )


def kernel_options(sides: tuple[int, int], dtype: torch.dtype, dim: int) -> dict[str, Any] | None:
    """Tile sizes of the compiled kernel: powers of two that divide these block sizes; None = torch's choice."""
    if not any(side % TORCHS_SIDE for side in sides):
        return None
    row = dtype.itemsize * max(LEAST_SIDE, 1 << (dim - 1).bit_length())
    most = min(SIDE, max(LEAST_SIDE, TILE_BYTES // row))
    tiles = [min(side & -side, most) for side in sides]
    # the other kernel, for few queries, would choose its own tile sizes
    return {"BLOCK_M": tiles[0], "BLOCK_N": tiles[1], "num_stages": 2, "FORCE_USE_FLEX_ATTENTION": True}


def _side(volume: int) -> int:
    """Smallest FlexAttention block that holds a tile and that the compiled kernel can divide."""
    return -(-volume // SIDE) * SIDE if volume > SIDE else max(LEAST_SIDE, 1 << (volume - 1).bit_length())


def _zero_masked(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Zero the masked rows of (B, H, L, D): NaN in the padding would survive a weight of 0."""
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Permute to (B, H, L, D) in tile order; padding is 0."""
    return x[:, :, rows.clamp(min=0)].masked_fill((rows < 0)[:, None], 0)


def flex_mask(
    plan: BlockPlan,
    lengths: tuple[int, int],
    before: tuple[int, int] = (0, 0),
    n_pooled: int = 0,
    key_mask: Tensor | None = None,
    pooled_mask: Tensor | None = None,
    heads: int | None = None,
) -> FlexMask:
    """Block mask of a plan.

    Args:
        plan: tiles and lists, one list for all heads or one per batch element and head.
        lengths: of queries and keys, global tokens included.
        before: tokens in front of the grid, among queries and among keys.
        n_pooled: pooled tokens, visible to grid queries.
        key_mask, pooled_mask: (B, lengths[1]) and (B, n_pooled) bool, True = attend.
        heads: of queries; required if lists differ by head.
    Raises: ValueError: lists that differ by head, without a number of heads that divides theirs or with a window.
    """
    groups = len(plan.kv_indices)
    if groups > 1 and (heads is None or groups % heads):
        raise ValueError(f"a plan with {groups} lists, of each batch element and head: give heads, got {heads}")
    if groups > 1 and plan.mask is not None:
        raise ValueError(f"a plan with {groups} lists and the mask of a window: make one plan for each list")
    query_rows, query_places = _order(plan, plan.q, lengths[0], before[0], 0)
    key_rows, key_places = _order(plan, plan.kv, lengths[1], before[1], n_pooled)
    if key_mask is not None or pooled_mask is not None:
        batch = len(key_mask if key_mask is not None else pooled_mask)  # type: ignore[arg-type]
        parts = [
            torch.ones(batch, n, dtype=torch.bool, device=key_rows.device) if x is None else x.expand(batch, -1)
            for x, n in ((key_mask, lengths[1]), (pooled_mask, n_pooled))
        ]
        key_mask = torch.cat(parts, 1)[:, key_rows.clamp(min=0)]
    visible, full = _visits(plan, query_places[0], key_places[0], heads if groups > 1 and heads else 1)
    full &= key_mask is None
    if plan.mask is None:
        mask_mod = _listed_mask_mod(visible, query_places[0], key_places[0], key_mask)
    else:
        mask_mod = _window_mask_mod(plan.mask, query_places, key_places, key_mask)
    mask = BlockMask.from_kv_blocks(
        *_lists(visible & ~full),
        *_lists(full),
        BLOCK_SIZE=(_side(plan.q.volume), _side(plan.kv.volume)),
        mask_mod=mask_mod,
        seq_lengths=(len(query_rows), len(key_rows)),
    )
    return FlexMask(mask, query_rows, key_rows)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _kept_mask(plan: BlockPlan, lengths: tuple[int, int], before: tuple[int, int], n_pooled: int) -> FlexMask:
    return flex_mask(plan, lengths, before, n_pooled)


def _order(plan: BlockPlan, tiling: Tiling, length: int, before: int, n_pooled: int) -> tuple[Tensor, Tensor]:
    """Rows in the sequence in tile order, (L,), and positions along the axes, (3, L), or the kind of a token off the
    grid."""
    device = plan.kv_indices.device
    axes = [torch.arange(count * side, device=device) for count, side in zip(tiling.counts, tiling.box, strict=True)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    for i, (count, side) in enumerate(zip(tiling.counts, tiling.box, strict=True)):
        places = places.unflatten(2 * i + 1, (count, side))
    side = _side(tiling.volume)
    places = places.permute(0, 1, 3, 5, 2, 4, 6).reshape(3, tiling.n_tiles, tiling.volume)
    places = torch.nn.functional.pad(places, (0, side - tiling.volume), value=-1).flatten(1)
    sides = torch.tensor(tiling.grid, device=device)[:, None]
    inside = ((places >= 0) & (places < sides)).all(0)
    coordinates = places.clamp(min=0).minimum(sides - 1)
    if plan.mask is not None:  # with dilation a position is not a coordinate
        coordinates = torch.stack([table[0, x] for table, x in zip(plan.mask.tables, coordinates, strict=True)])
    x0, x1, x2 = coordinates
    rows = torch.where(inside, before + (x0 * tiling.grid[1] + x1) * tiling.grid[2] + x2, -1)
    places = places.masked_fill(~inside, NOTHING)
    own = torch.arange(length, device=device)
    off_grid = torch.cat([own[:before], own[before + tiling.n_tokens :]])
    for more, kind in ((off_grid, OFF_GRID), (length + torch.arange(n_pooled, device=device), POOLED)):
        short = -len(more) % side
        rows = torch.cat([rows, more, more.new_full((short,), -1)])
        kinds = torch.cat([torch.full_like(more, kind), more.new_full((short,), NOTHING)])
        places = torch.cat([places, kinds.expand(3, -1)], 1)
    return rows, places


def _visits(plan: BlockPlan, queries: Tensor, keys: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Key blocks that each query block attends to, and those among them that need no mask: (1|B, 1|H, query blocks, key
    blocks) bool each.

    queries, keys: positions along the first axis, or kinds; a block contains one kind, then padding.
    """
    queries, keys = (x.view(-1, _side(tiling.volume)) for x, tiling in ((queries, plan.q), (keys, plan.kv)))
    whole = (keys != NOTHING).all(1)
    q, k = queries[:, :1], keys[None, :, 0]
    off_grid = (k == OFF_GRID) | ((q == OFF_GRID) & (k != POOLED)) | ((q >= 0) & (k == POOLED))
    visible = off_grid.repeat(len(plan.kv_indices), 1, 1)
    full = visible & whole
    place = torch.arange(plan.kv_indices.shape[2], device=plan.kv_indices.device)
    for kind, counts in (
        (visible, plan.kv_counts),
        (full, plan.kv_counts if plan.full_kv_counts is None else plan.full_kv_counts),
    ):
        group, tile, at = (place < counts[..., None]).nonzero(as_tuple=True)
        kind[group, tile, plan.kv_indices[group, tile, at].long()] = True
    if plan.full_kv_counts is None:
        full &= whole
    return visible.unflatten(0, (-1, heads)), full.unflatten(0, (-1, heads))


def _lists(kind: Tensor) -> tuple[Tensor, Tensor]:
    """Number of marked blocks per row, and the indices of all blocks, marked ones first."""
    order = torch.argsort(kind.to(torch.uint8), dim=-1, descending=True, stable=True)
    return kind.sum(-1, dtype=torch.int32), order.int()


def _listed_mask_mod(listed: Tensor, queries: Tensor, keys: Tensor, key_mask: Tensor | None) -> Callable[..., Tensor]:
    """FlexAttention's ``mask_mod`` if listed blocks are visible as a whole, except for padding."""
    q_side, k_side = len(queries) // listed.shape[2], len(keys) // listed.shape[3]
    by_batch, by_head = (n > 1 for n in listed.shape[:2])
    token = keys != NOTHING

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = listed[b if by_batch else b * 0, h if by_head else h * 0, q // q_side, k // k_side] & token[k]
        return visible if key_mask is None else visible & key_mask[b, k]

    return mask_mod


def _window_mask_mod(mask: WindowMask, queries: Tensor, keys: Tensor, key_mask: Tensor | None) -> Callable[..., Tensor]:
    """FlexAttention's ``mask_mod`` of a window; positions are looked up in tile order."""
    q_kind, k_kind = queries[0], keys[0]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = (q_kind[q] >= 0) & (k_kind[k] >= 0)
        for axis, (inside, table) in enumerate(zip(mask.intervals, mask.tables, strict=True)):
            if inside:
                place, other = queries[axis][q].clamp(min=0), keys[axis][k]
                near = near & (table[1][place] <= other) & (other <= table[2][place])
        if mask.weights is not None:
            cost = sum(w * (queries[i][q] - keys[i][k]).double() ** 2 for i, w in enumerate(mask.weights) if w)
            near = near & (cost < mask.limit)
        off_grid = (q_kind[q] == OFF_GRID) & (k_kind[k] != POOLED)
        visible = near | off_grid | (k_kind[k] == OFF_GRID) | ((k_kind[k] == POOLED) & (q_kind[q] >= 0))
        visible = visible & (k_kind[k] != NOTHING)
        return visible if key_mask is None else visible & key_mask[b, k]

    return mask_mod
