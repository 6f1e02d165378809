"""Block plans: the key tiles that each query tile attends to, as walked by the block-sparse kernels.

Queries and keys of a grid are cut into tiles. For each query tile a plan lists key tiles: first the full ones, which
need no mask, then the partial ones, in which the kernel applies a `WindowMask` to the coordinates. Plans of windows
are computed from the geometry of each axis; no array has S × S or tiles × tiles entries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..tiling import Tiling
from ..windows.geometry import BallAxis, Geometry, NeighborhoodAxis

__all__ = ["BlockPlan", "TransposedPlan", "WindowMask", "cheapest_window_plan", "transpose_block_lists", "window_plan"]

# Cost of a partial tile relative to a full one: coordinates are compared (measured: H100, D = 128, bf16). With tiles of
# 128 keys Hopper's kernel compares those of one tile per step, not of two.
PARTIAL_COST = 1.35
PARTIAL_COST_OF = {128: 1.15}
EXACT_INTEGERS = 2**23  # float32 holds all integers up to twice this


@dataclass(frozen=True, eq=False)
class WindowMask:
    """Mask of a window. On every axis of ``intervals`` the position of the key must lie in the interval of the query;
    in a ball the weighted sum of the squared distances along the axes must be less than ``limit``.

    tables: (3, 3, longest axis) int32: for each axis and position the coordinate, and first and last position visible
        from it.
    ordered: axes on which positions are not coordinates (dilation).
    weights: of the squared distances; None = no ball. exact: whether float32 can separate inside from outside.
    ball: (4,) float64 weights and limit for kernels, whose scalars are float32; None if exact.
    """

    tables: Tensor
    intervals: tuple[bool, bool, bool]
    ordered: tuple[bool, bool, bool]
    weights: tuple[float, float, float] | None
    limit: float
    exact: bool
    ball: Tensor | None = None


def transpose_block_lists(lists: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Transpose a padded block list to CSR: for each of ``n`` columns, the rows that list it, in ascending order, so
    that reductions are deterministic. Padding entries equal ``n``.

    Args: lists: (G, M, m) int32, columns listed by each of M rows; n: number of columns.
    Returns: (G, M*m) int32 rows, concatenated by column; (G, n + 1) int32 offsets of the columns.
    """
    found = lists.flatten(1).sort(dim=1, stable=True)
    every = _counted(len(lists), n + 1, lists.device)
    return (found.indices // lists.shape[2]).int(), torch.searchsorted(found.values, every, out_int32=True)


@lru_cache(maxsize=16)
def _counted(groups: int, n: int, device: torch.device) -> Tensor:
    """Constant (groups, n) int32, each row 0 to n - 1."""
    return torch.arange(n, dtype=torch.int32, device=device).expand(groups, -1).contiguous()


class TransposedPlan(NamedTuple):
    """Transpose of a plan: for each key tile the query tiles that attend to it, full ones first.

    q_indices: (1 or G, n) int32, concatenated lists. q_starts: (1 or G, kv.n_tiles) int32 place of the first entry of
    each list. full_q_counts, q_counts: (1 or G, kv.n_tiles) int32.
    """

    q_indices: Tensor
    q_starts: Tensor
    full_q_counts: Tensor
    q_counts: Tensor


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """List of tiles of ``kv`` for each tile of ``q``.

    kv_indices: (1 or G, q.n_tiles, n) int32: full tiles first, then partial ones; the rest is arbitrary.
    full_kv_counts, kv_counts: (1 or G, q.n_tiles) int32; full_kv_counts None = all are full but short tiles at the far
        edge.
    mask: applied inside partial tiles; None = all grid tokens of a listed tile are visible.
    all_full: known to have no partial tile.
    work: for windows, the mean cost of a query tile in keys; keys of partial tiles cost more.
    """

    q: Tiling
    kv: Tiling
    kv_indices: Tensor
    full_kv_counts: Tensor | None
    kv_counts: Tensor
    mask: WindowMask | None = None
    all_full: bool = False
    work: float = 0.0

    @cached_property
    def transposed(self) -> TransposedPlan:
        """Transpose of the lists."""
        n_k = self.kv.n_tiles
        place = torch.arange(self.kv_indices.shape[2], dtype=torch.int32, device=self.kv_indices.device)
        listed = place < self.kv_counts[..., None]
        if self.full_kv_counts is None:  # all listed tiles are of one kind
            tiles, ends = transpose_block_lists(torch.where(listed, self.kv_indices, n_k), n_k)
            n_tiles = ends.diff()
            return TransposedPlan(tiles, ends[:, :-1].contiguous(), n_tiles, n_tiles)
        kind = self.kv_indices * 2 + (place >= self.full_kv_counts[..., None]).int()
        tiles, ends = transpose_block_lists(torch.where(listed, kind, 2 * n_k), 2 * n_k)
        first, full_end, end = ends[:, :-1:2], ends[:, 1::2], ends[:, 2::2]
        return TransposedPlan(tiles, first.contiguous(), (full_end - first).contiguous(), (end - first).contiguous())

    def describe(self) -> str:
        """Summary in one line: the tile shapes, tiles visited per query tile, and the fraction of all logits in visited
        tiles."""
        visited = self.kv_counts.float().mean().item()
        full = visited if self.full_kv_counts is None else self.full_kv_counts.float().mean().item()
        logits = self.kv_counts.double().mean(0).sum().item() * self.q.volume * self.kv.volume
        share = logits / (self.q.n_tokens * self.kv.n_tokens)
        return (
            f"query tiles {_short(self.q)}, key tiles {_short(self.kv)}: {self.q.n_tiles} query tiles visit "
            f"{visited:.1f} of {self.kv.n_tiles} key tiles each ({full:.1f} full), {share:.2%} of the logits"
        )


def _short(tiling: Tiling) -> str:
    sides: tuple[int, ...] = tiling.box
    while len(sides) > 1 and tiling.grid[len(tiling.grid) - len(sides)] == 1:
        sides = sides[1:]
    return "×".join(map(str, sides))


@dataclass(frozen=True)
class _Reach:
    """Interval of key tiles for each tile of queries along one axis, (tiles, longest interval) each.

    tile: the key tile. visible: it belongs to the interval. full: complete, and visible to every query. near, far:
    least and greatest weighted squared distance between their coordinates.
    """

    tile: np.ndarray
    visible: np.ndarray
    full: np.ndarray
    near: np.ndarray
    far: np.ndarray

    @property
    def middle(self) -> _Reach:
        """Reach of the middle query tile only."""
        i = slice(len(self.tile) // 2, len(self.tile) // 2 + 1)
        return _Reach(self.tile[i], self.visible[i], self.full[i], self.near[i], self.far[i])


def _reach(g: Geometry, weight: float, q_side: int, k_side: int) -> _Reach:
    order, first, last = (x.numpy() for x in (g.order, g.first, g.last))
    n = len(order)
    queries = _tiled(np.arange(n), q_side)
    first, last, place = first[queries], last[queries], order[queries]
    low, high = first.min(1) // k_side, last.max(1) // k_side
    tile = low[:, None] + np.arange((high - low).max() + 1)
    visible = tile <= high[:, None]
    full = (tile * k_side >= first.max(1, keepdims=True)) & ((tile + 1) * k_side <= last.min(1, keepdims=True) + 1)
    keys = order[_tiled(np.arange(n), k_side)]
    k_low, k_high = keys.min(1), keys.max(1)
    kept = tile.clip(max=len(keys) - 1)
    q_low, q_high = place.min(1, keepdims=True), place.max(1, keepdims=True)
    near = np.maximum(k_low[kept] - q_high, q_low - k_high[kept]).clip(min=0).astype(np.float64)
    far = np.maximum(k_high[kept] - q_low, q_high - k_low[kept]).astype(np.float64)
    return _Reach(tile, visible, full & visible, weight * near**2, weight * far**2)


def _tiled(places: np.ndarray, side: int) -> np.ndarray:
    """Cut positions into (tiles, side); a short tile repeats its last position."""
    return np.pad(places, (0, -len(places) % side), mode="edge").reshape(-1, side)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def window_plan(
    axes: tuple[NeighborhoodAxis | BallAxis, ...],
    limit: float,
    q_volume: int,
    kv_volume: int,
    device: torch.device,
) -> BlockPlan:
    """Plan of a window, with tiles of about the given volumes in the shape of the least work."""
    axes = (*(NeighborhoodAxis(1, 1, 1, 1, False) for _ in range(3 - len(axes))), *axes)
    geometries = [axis.geometry() for axis in axes]
    mask = _window_mask(axes, geometries, limit, device)
    weights = mask.weights
    q_box, k_box = _choose_boxes(geometries, weights, mask.limit, q_volume, kv_volume)
    grid = tuple(axis.length for axis in axes)
    q, kv = Tiling(grid, q_box), Tiling(grid, k_box)  # type: ignore[arg-type]
    reaches = [_reach(*of) for of in zip(geometries, weights or (0.0,) * 3, q_box, k_box, strict=True)]
    tiles, visible, full = (torch.from_numpy(x) for x in _combine(reaches, kv.counts, weights is not None, mask.limit))
    place = torch.argsort(2 - visible.int() - full.int(), dim=1, stable=True)
    n_tiles, n_full = visible.sum(1, dtype=torch.int32), full.sum(1, dtype=torch.int32)
    listed = tiles.gather(1, place[:, : int(n_tiles.max())]).int()
    all_full = bool((n_full == n_tiles).all())
    partial = (n_tiles - n_full) * PARTIAL_COST_OF.get(kv.volume, PARTIAL_COST)
    work = kv.volume * float((n_full + partial).mean())
    listed, n_full, n_tiles = (x[None].to(device) for x in (listed, n_full, n_tiles))
    return BlockPlan(q, kv, listed, n_full, n_tiles, mask, all_full, work)


@lru_cache(maxsize=64)
def cheapest_window_plan(
    axes: tuple[NeighborhoodAxis | BallAxis, ...],
    limit: float,
    volumes: tuple[tuple[int, int], ...],
    device: torch.device,
) -> BlockPlan:
    """Plan with the least work among tile volumes (queries, keys); the first of equals."""
    return min((window_plan(axes, limit, *pair, device) for pair in volumes), key=lambda plan: plan.work)


def _combine(
    reaches: Sequence[_Reach], counts: Sequence[int], is_ball: bool, limit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Key tiles of each query tile, (query tiles, interval): index, visible, full."""
    first, *others = reaches
    tile, visible, full, near, far = first.tile, first.visible, first.full, first.near, first.far
    for r, count in zip(others, counts[1:], strict=True):
        tile = _outer(tile * count, r.tile, np.add)
        visible, full = _outer(visible, r.visible, np.logical_and), _outer(full, r.full, np.logical_and)
        if is_ball:
            near, far = _outer(near, r.near, np.add), _outer(far, r.far, np.add)
    return (tile, visible & (near < limit), full & (far < limit)) if is_ball else (tile, visible, full)


def _outer(a: np.ndarray, b: np.ndarray, op: Callable[..., np.ndarray]) -> np.ndarray:
    """Outer operation over both axes: (M, L), (m, l) → (M m, L l)."""
    return op(a[:, None, :, None], b[None, :, None, :]).reshape(len(a) * len(b), -1)


def _window_mask(
    axes: Sequence[NeighborhoodAxis | BallAxis], geometries: Sequence[Geometry], limit: float, device: torch.device
) -> WindowMask:
    longest = max(len(g.order) for g in geometries)
    tables = torch.zeros(3, 3, longest, dtype=torch.int32, device="cpu")
    for table, g in zip(tables, geometries, strict=True):
        table[:, : len(g.order)] = torch.stack([g.order, g.first, g.last]).int()
    whole = [bool((g.first == 0).all() and (g.last == len(g.order) - 1).all()) for g in geometries]
    ordered = tuple(bool((g.order != torch.arange(len(g.order), device="cpu")).any()) for g in geometries)
    curved = [i for i, axis in enumerate(axes) if isinstance(axis, BallAxis) and axis.weight > 0]
    weights, exact = None, True
    if len(curved) == 1:  # a ball over one axis is an interval, except for the ends that its reach was rounded up to
        i = curved[0]
        reach = torch.arange(axes[i].length, device="cpu", dtype=torch.float64)
        most = int((geometries[i].weight * reach**2 < limit).sum()) - 1
        tables[i, 1, : axes[i].length] = (geometries[i].order - most).clamp(min=0)
        tables[i, 2, : axes[i].length] = (geometries[i].order + most).clamp(max=axes[i].length - 1)
        g = geometries[i]
        g.first.copy_(tables[i, 1, : axes[i].length])
        g.last.copy_(tables[i, 2, : axes[i].length])
        whole[i] = most >= axes[i].length - 1
    elif curved:
        weights, limit, exact = _ball(axes, limit)
    inside = tuple(not w and weights is None for w in whole)
    ball = None
    if weights and not exact:
        ball = torch.tensor([*weights, limit], dtype=torch.float64, device=device)
    return WindowMask(tables.to(device), inside, ordered, weights, limit, exact, ball)  # type: ignore[arg-type]


def _ball(axes: Sequence[NeighborhoodAxis | BallAxis], limit: float) -> tuple[tuple[float, float, float], float, bool]:
    """Weights of the squares and a limit that is safe in float32: halfway between the greatest cost inside and the
    least cost outside."""
    weights = [axis.weight if isinstance(axis, BallAxis) else 0.0 for axis in axes]
    if all(w in (0.0, 1.0) for w in weights):
        far = sum(w * axis.length**2 for w, axis in zip(weights, axes, strict=True))
        return tuple(weights), math.ceil(limit) - 0.5, far < EXACT_INTEGERS  # type: ignore[return-value]
    cost = torch.zeros(1, dtype=torch.float64, device="cpu")
    for w, axis in zip(weights, axes, strict=True):
        reach = min(axis.length - 1, axis.reach + 1) if isinstance(axis, BallAxis) and w else 0
        squares = w * torch.arange(reach + 1, dtype=torch.float64, device="cpu") ** 2
        cost = (cost[:, None] + squares).flatten()
    inside, outside = cost[cost < limit].max().item(), cost[cost >= limit]
    beyond = outside.min().item() if len(outside) else inside + 1
    middle = (inside + beyond) / 2
    whole = all(w.is_integer() for w in weights) and middle < EXACT_INTEGERS
    return tuple(weights), middle, whole or beyond - inside > 4e-6 * middle  # type: ignore[return-value]


def _choose_boxes(
    geometries: Sequence[Geometry], weights: Sequence[float] | None, limit: float, q_volume: int, kv_volume: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tile shapes of queries and keys with the least work. Along the axes of a ball the middle tile represents all."""

    @cache
    def reach(axis: int, q_side: int, k_side: int) -> tuple[_Reach, int, int, int]:
        r = _reach(geometries[axis], weights[axis] if weights else 0.0, q_side, k_side)
        return r.middle, len(r.tile), int(r.visible.sum()), int(r.full.sum())

    def cost(q_box: tuple[int, ...], k_box: tuple[int, ...]) -> float:
        middles, counts, visible, full = zip(*map(reach, range(3), q_box, k_box), strict=True)
        visits, whole = math.prod(visible), math.prod(full)
        if weights is not None:
            _, in_reach, inside = _combine(middles, (1, 1, 1), True, limit)
            visits, whole = (math.prod(counts) * int(x.sum()) for x in (in_reach, inside))
        return whole + PARTIAL_COST * (visits - whole)

    lengths = [len(g.order) for g in geometries]
    pairs = itertools.product(_boxes(lengths, q_volume), _boxes(lengths, kv_volume))
    return min(pairs, key=lambda pair: (cost(*pair), _unevenness(pair[0]), _unevenness(pair[1])))


def _unevenness(box: tuple[int, ...]) -> float:
    """Tie-breaker that prefers compact tiles that are wide in x, so that rows of memory are long."""
    return sum(box[:-1]) + 0.5 * box[-1]


def _boxes(lengths: Sequence[int], volume: int) -> Iterator[tuple[int, ...]]:
    """Tile shapes with power-of-two sides of the given volume, or of the whole grid's if that is less."""
    most = [1 << (n - 1).bit_length() for n in lengths]
    volume = min(1 << (volume.bit_length() - 1), math.prod(most))
    sides = [[2**i for i in range(m.bit_length()) if 2**i <= m] for m in most]
    return (box for box in itertools.product(*sides) if math.prod(box) == volume)
