"""Query tiles and key lists of local windows on a 1-, 2- or 3-D grid, computed from the geometry of each axis.

A query attends to a key if the costs of their distances along the axes add up to less than ``limit``. Coordinates of an
axis are sorted by dilation group: the keys visible to a query are then one interval, and a tile is a box of intervals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..block_sparse.reference import TileRows, Tiles

__all__ = ["BallAxis", "Geometry", "NeighborhoodAxis", "window_tiles"]

MAX_QUERIES = 256  # per tile
ALMOST = 0.85
KEPT_BYTES = 16 * 2**20  # plans with smaller lists and masks keep them in memory
# Cost of gathering a key and value row, and of starting a tile, in units of one logit (measured: 2 cores, D = 64).
GATHER_COST, TILE_COST = 30, 1500


@dataclass(frozen=True)
class Geometry:
    """Axis sorted by dilation group.

    order: (N,) the coordinate at each position. step: (N,) index of the coordinate within its group.
    first, last: (N,) the interval of positions visible to a query at this position; both grow along a group.
    weight: cost of a squared distance of one.
    """

    order: Tensor
    step: Tensor
    first: Tensor
    last: Tensor
    weight: float


@dataclass(frozen=True)
class NeighborhoodAxis:
    """Generalized neighborhood attention along one axis."""

    length: int
    window: int
    stride: int
    dilation: int
    is_causal: bool

    def geometry(self) -> Geometry:
        x = torch.arange(self.length, device="cpu")
        group, i = x % self.dilation, x // self.dilation
        order = torch.argsort(group * self.length + i)
        group, i = group[order], i[order]
        size = (self.length - 1 - group) // self.dilation + 1
        base = torch.arange(self.length, device="cpu") - i
        last_place = size - 1
        if self.is_causal:
            leader = torch.minimum(i // self.stride * self.stride + self.stride - 1, last_place)
            first, last = (leader - self.window + 1).clamp(min=0), i
        else:
            left, right = self.window // 2, self.window // 2 + self.window % 2 - 1
            leader = torch.minimum(i // self.stride * self.stride + self.stride // 2, last_place)
            centre = torch.minimum(leader.clamp(min=left), last_place - right)
            first, last = centre - left, centre + right
        return Geometry(order, i, base + first, base + last, 0.0)


@dataclass(frozen=True)
class BallAxis:
    """Distances of at most ``reach`` along one axis, each at the cost ``weight`` times its square."""

    length: int
    reach: int
    weight: float

    def geometry(self) -> Geometry:
        x = torch.arange(self.length, device="cpu")
        return Geometry(x, x, (x - self.reach).clamp(min=0), (x + self.reach).clamp(max=self.length - 1), self.weight)


@dataclass(frozen=True)
class _Bucket:
    """Tiles of an axis that have one shape; queries (m, nq) and keys (m, nk) are positions in the axis' order."""

    geometry: Geometry
    queries: Tensor
    keys: Tensor
    uniform: bool  # every tile has the same pattern

    def cost(self, tiles: Tensor) -> Tensor:
        """Cost of each pair, (n, nq, nk), or (1, nq, nk) if all tiles are alike."""
        g = self.geometry
        q, k = self.queries[tiles], self.keys[tiles]
        if self.uniform:
            q, k = q[:1], k[:1]
        distance = (g.order[q][:, :, None] - g.order[k][:, None, :]).double()
        near = (g.first[q][:, :, None] <= k[:, None, :]) & (k[:, None, :] <= g.last[q][:, :, None])
        return torch.where(near, g.weight * distance.square(), torch.inf)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def window_tiles(
    axes: tuple[NeighborhoodAxis | BallAxis, ...],
    limit: float,
    before: int,
    others: tuple[tuple[int, int], ...],
    device: torch.device,
) -> tuple[Tiles, ...]:
    """Tiles of the grid's queries; ``others`` are ranges of rows off the grid that are visible to every tile."""
    geometries = [axis.geometry() for axis in axes]
    lengths = [axis.length for axis in axes]
    n_others = sum(stop - start for start, stop in others)
    strides = [axis.stride if isinstance(axis, NeighborhoodAxis) else 1 for axis in axes]
    sizes = _tile_sizes(geometries, strides, n_others)
    buckets = [_buckets(g, size, device) for g, size in zip(geometries, sizes, strict=True)]
    shared = torch.cat(
        [torch.arange(*span, device=device) for span in others] or [torch.empty(0, dtype=torch.int64, device=device)]
    )
    plan = tuple(_box_tiles(boxes, lengths, limit, before, shared) for boxes in itertools.product(*buckets))
    if sum(tiles.count * tiles.n_keys * (tiles.n_queries + 8) for tiles in plan) > KEPT_BYTES:
        return plan
    return tuple(_made_once(tiles) for tiles in plan)


def _made_once(tiles: Tiles) -> Tiles:
    """Copy of the tiles with their rows in memory."""
    made = tiles.rows(0, tiles.count)

    def rows(start: int, stop: int) -> TileRows:
        visible = made.visible if made.visible is None or made.visible.shape[1] == 1 else made.visible[:, start:stop]
        return TileRows(made.queries[:, start:stop], made.keys[:, start:stop], visible)  # type: ignore[index]

    return replace(tiles, rows=rows)


def _box_tiles(boxes: tuple[_Bucket, ...], lengths: list[int], limit: float, before: int, shared: Tensor) -> Tiles:
    """Tiles with one bucket along each axis."""
    counts = [len(box.queries) for box in boxes]
    uniform = all(box.uniform for box in boxes)
    full = uniform and sum(box.cost(shared.new_zeros(1)).max().item() for box in boxes) < limit

    def rows(start: int, stop: int) -> TileRows:
        index = torch.arange(start, stop, device=shared.device)
        places = torch.unravel_index(index, counts)
        queries = keys = index.new_zeros(len(index), 1)
        cost = torch.zeros(1, 1, 1, dtype=torch.float64, device=shared.device)
        for box, place, length in zip(boxes, places, lengths, strict=True):
            order = box.geometry.order
            queries = (queries[:, :, None] * length + order[box.queries[place]][:, None, :]).flatten(1)
            keys = (keys[:, :, None] * length + order[box.keys[place]][:, None, :]).flatten(1)
            if not full:
                c = box.cost(place)
                sides = [a * b for a, b in zip(cost.shape[1:], c.shape[1:], strict=True)]
                cost = (cost[:, :, None, :, None] + c[:, None, :, None, :]).reshape(-1, *sides)
        keys = torch.cat([keys + before, shared.expand(len(index), -1)], 1)
        visible = None if full else torch.nn.functional.pad(cost < limit, (0, len(shared)), value=True)
        return TileRows((queries + before)[None], keys[None], None if visible is None else visible[None])

    return Tiles(
        count=math.prod(counts),
        n_queries=math.prod(box.queries.shape[1] for box in boxes),
        n_keys=math.prod(box.keys.shape[1] for box in boxes) + len(shared),
        rows=rows,
    )


def _cut(geometry: Geometry, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tiles of at most ``size`` positions of one group: their first and last position, and the interval of visible
    keys."""
    starts = (geometry.step % size == 0).nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([len(geometry.order)])]) - 1
    return starts, ends, geometry.first[starts], geometry.last[ends]


def _buckets(geometry: Geometry, size: int, device: torch.device) -> list[_Bucket]:
    starts, ends, first, last = _cut(geometry, size)
    lengths = _rounded_up(last - first + 1)
    first = torch.minimum(first, len(geometry.order) - lengths)  # padded backwards; masked by the pattern
    shapes, member = torch.unique(torch.stack([ends - starts + 1, lengths], 1), dim=0, return_inverse=True)
    g = geometry
    on_device = Geometry(g.order.to(device), g.step.to(device), g.first.to(device), g.last.to(device), g.weight)
    found = []
    for i, (n_queries, n_keys) in enumerate(shapes.tolist()):
        of_shape = (member == i).nonzero()[:, 0]
        queries = starts[of_shape, None] + torch.arange(n_queries, device="cpu")
        keys = first[of_shape, None] + torch.arange(n_keys, device="cpu")
        pattern = torch.cat(
            [
                geometry.first[queries] - keys[:, :1],
                geometry.last[queries] - keys[:, :1],
                geometry.order[queries] - geometry.order[keys[:, :1]],
            ],
            1,
        )
        uniform = bool((pattern == pattern[:1]).all())
        found.append(_Bucket(on_device, queries.to(device), keys.to(device), uniform))
    return found


def _rounded_up(lengths: Tensor) -> Tensor:
    """Round lengths up to slightly longer ones: fewer shapes, fewer steps."""
    longest, shapes = math.inf, {}
    for length in sorted(set(lengths.tolist()), reverse=True):
        if not ALMOST * longest <= length <= longest:
            longest = length
        shapes[length] = longest
    return torch.tensor([shapes[length] for length in lengths.tolist()], device="cpu")


def _tile_sizes(geometries: Sequence[Geometry], strides: Sequence[int], n_others: int) -> tuple[int, ...]:
    """Sides of the tiles with the least work."""
    sides = []
    for geometry, stride in zip(geometries, strides, strict=True):
        length = len(geometry.order)
        candidates = {2**i for i in range(9)} | {stride * i for i in range(1, 9)}
        sides.append([_work(geometry, size) for size in sorted(candidates) if size <= min(MAX_QUERIES, 2 * length)])
    allowed = [c for c in itertools.product(*sides) if math.prod(side[0] for side in c) <= MAX_QUERIES]

    def total(choice: tuple[tuple[int, int, int, int], ...]) -> float:
        tiles, keys, logits = (math.prod(side[i] for side in choice) for i in (1, 2, 3))
        return logits + GATHER_COST * (keys + tiles * n_others) + TILE_COST * tiles

    return tuple(side[0] for side in min(allowed, key=total))


def _work(geometry: Geometry, size: int) -> tuple[int, int, int, int]:
    """Work of a tile size: (tile size, tiles, keys summed over tiles, logits summed over tiles)."""
    starts, ends, first, last = _cut(geometry, size)
    queries, keys = ends - starts + 1, last - first + 1
    return size, len(starts), int(keys.sum()), int((queries * keys).sum())
