"""Groups of arguments of the block-sparse kernels; see ``kernels/arguments.py``."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..arguments import Mask, Rows, Tokens, mask_of, rows_of
from ..launch import Boxes, cdiv, next_pow2_min16
from ..tiling import Tiling
from ..windows.visible_kernel import Window
from .plan import BlockPlan, TransposedPlan, WindowMask

__all__ = [
    "Added",
    "FullTiles",
    "Lists",
    "State",
    "Static",
    "lists_of",
    "pooled_of",
    "state_of",
    "static_of",
    "tokens_of",
    "window_of",
]

FullTiles = Literal["none", "counted", "all", "all but the last"]
State = Literal["none", "one", "of each tile"]
NO_AXIS = (False, False, False)


class Lists(NamedTuple):
    """List of the tiles that each tile of a head attends to, full ones first: (G or 1, tiles, longest), or concatenated
    lists (G or 1, all) with the place ``starts`` of the first entry of each. ``stride``: between heads, 0 for one list
    for all heads. full_counts None = all tiles are full."""

    indices: Any
    starts: Any
    full_counts: Any
    counts: Any
    stride: int
    longest: int


class Added(NamedTuple):
    """What is added to the attention of grid queries; see :class:`forward.LinearBranch`."""

    state: Any
    norm: Any
    eps: Any
    bias: Any


class Static(NamedTuple):
    """Compile-time parameters.

    D, BLOCK_D: head dim, and rounded up to a power of two. BLOCK_E: columns of the state per step. BM, BN: rows of
    queries and keys of a block. QB, KB: shapes of tiles of queries and keys. Q_PARTS, K_PARTS: blocks per tile.
    FULL: which tiles of a list need no window. WHOLE: blocks of these have no invalid key. PARTIAL: other tiles are
    listed. GLOBAL_QUERIES, GLOBAL_KEYS: some are off the grid. IN, BALL, COST, ORDERED: see
    ``windows/visible_kernel.py``. STATE: states of the linear branch. ADD: gradients are added to the content of their
    tensors. NEGATE: the scale is negative. PRECISION: of products. BOXES: how tiles are loaded, see
    ``launch.box_descriptors``.
    """

    D: int
    BLOCK_D: int
    BLOCK_E: int
    BM: int
    BN: int
    QB: tuple[int, int, int]
    KB: tuple[int, int, int]
    Q_PARTS: int
    K_PARTS: int
    FULL: FullTiles
    WHOLE: bool
    PARTIAL: bool
    GLOBAL_QUERIES: bool
    GLOBAL_KEYS: bool
    IN: tuple[bool, bool, bool]
    BALL: tuple[bool, bool, bool]
    COST: str
    ORDERED: tuple[bool, bool, bool]
    STATE: State
    FEATURE_MAP: str
    ADD: bool
    NEGATE: bool
    PRECISION: str
    BOXES: str


def tokens_of(length: int, before: int, tiling: Tiling) -> Tokens:
    """Group of a sequence whose grid is cut into tiles."""
    return Tokens(length, before, *tiling.grid)


def lists_of(plan: BlockPlan | TransposedPlan) -> Lists:
    """Group of the lists of a plan, or of its transpose."""
    indices = plan.q_indices if isinstance(plan, TransposedPlan) else plan.kv_indices
    stride, longest = indices.stride(0) if len(indices) > 1 else 0, indices.shape[-1]
    if isinstance(plan, TransposedPlan):
        return Lists(indices, plan.q_starts, plan.full_q_counts, plan.q_counts, stride, longest)
    return Lists(indices, None, plan.full_kv_counts, plan.kv_counts, stride, longest)


def window_of(mask: WindowMask | None) -> Window:
    """Group of a plan's mask; None = no window."""
    if mask is None:
        return Window(None, 0, None, 0.0, 0.0, 0.0, 0.0)
    return Window(mask.tables, mask.tables.shape[2], mask.ball, *(mask.weights or (0.0, 0.0, 0.0)), mask.limit)


def pooled_of(key: Tensor | None, value: Tensor | None, mask: Tensor | None) -> tuple[Rows, Rows, Mask, int]:
    """Groups of pooled keys and values (B, H, P, D) and of their mask, and P; None = there are none."""
    return rows_of(key), rows_of(value), mask_of(mask), 0 if key is None else key.shape[2]


def state_of(state: Tensor | None) -> State:
    """Which states (G, 1 or q tiles, D, D) a linear branch has."""
    if state is None:
        return "none"
    return "one" if state.shape[1] == 1 else "of each tile"


def static_of(
    query: Tensor,
    plan: BlockPlan,
    block_q: int,
    block_k: int,
    *,
    scale: float,
    full: FullTiles,
    whole: bool,
    n_global: tuple[int, int],
    boxes: Boxes | None = None,
    state: State = "none",
    feature_map: str = "relu",
    block_e: int = 16,
    add: bool = False,
) -> Static:
    """Compile-time parameters of a plan; block_q, block_k: rows of a block, ``n_global``: queries and keys off the
    grid; the others as in :class:`Static`."""
    q, kv, mask, dim = plan.q, plan.kv, plan.mask, query.shape[-1]
    weights = (mask and mask.weights) or (0.0, 0.0, 0.0)
    return Static(
        D=dim,
        BLOCK_D=next_pow2_min16(dim),
        BLOCK_E=block_e,
        BM=block_q,
        BN=block_k,
        QB=q.box,
        KB=kv.box,
        Q_PARTS=cdiv(q.volume, block_q),
        K_PARTS=cdiv(kv.volume, block_k),
        FULL=full,
        WHOLE=whole,
        PARTIAL=full != "all" and not (full == "counted" and plan.all_full),
        GLOBAL_QUERIES=n_global[0] > 0,
        GLOBAL_KEYS=n_global[1] > 0,
        IN=mask.intervals if mask else NO_AXIS,
        BALL=(bool(weights[0]), bool(weights[1]), bool(weights[2])),
        COST=_cost(mask),
        ORDERED=mask.ordered if mask else NO_AXIS,
        STATE=state,
        FEATURE_MAP=feature_map,
        ADD=add,
        NEGATE=scale < 0,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        BOXES=boxes[2] if boxes else "none",
    )


def _cost(mask: WindowMask | None) -> str:
    """How distances are compared with a ball; see ``windows/visible_kernel.py``."""
    if mask is None or mask.weights is None or (mask.exact and set(mask.weights) <= {0.0, 1.0}):
        return "expanded"
    return "float32" if mask.exact else "float64"
