"""Tree of pooled tokens over a grid, as index tables: tiles, tiles of tiles, and so on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ._boxes import box_blocks, box_grid, factorisations

__all__ = ["Level", "default_levels", "level_grids", "make_tree", "tile_shapes"]


def _tile_shape(grid: Sequence[int], size: Sequence[int], block: int) -> tuple[int, ...]:
    """Sides of a tile of ``block`` cells on a grid of cells that are ``size`` tokens large: as full as the grid allows,
    then as compact as possible, then longer along the faster axes."""

    def rank(sides: tuple[int, ...]) -> tuple[float, float, tuple[int, ...]]:
        cells = math.prod(min(side, n) for side, n in zip(sides, grid, strict=True))
        extents = [side * s for side, s, n in zip(sides, size, grid, strict=True) if n > 1] or [1]
        return -cells, max(extents) / min(extents), sides

    return min(factorisations(block, len(grid)), key=rank)


def tile_shapes(grid: Sequence[int], block: int, levels: int) -> tuple[tuple[int, ...], ...]:
    """Tile shape of each level, in cells of the level below."""
    shapes: list[tuple[int, ...]] = []
    size = (1,) * len(grid)
    for _ in range(levels):
        shape = _tile_shape(grid, size, block)
        shapes.append(shape)
        grid = box_grid(grid, shape)
        size = tuple(a * b for a, b in zip(size, shape, strict=True))
    return tuple(shapes)


def level_grids(grid: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Grid of tokens at each level, level 0 first."""
    grids = [tuple(grid)]
    for shape in shapes:
        grids.append(box_grid(grids[-1], shape))
    return grids


@lru_cache(maxsize=256)
def default_levels(grid: Sequence[int], block: int, topk: int) -> int:
    """Smallest L >= 1 with at most 64·topk tokens at level L."""
    levels = 1
    while math.prod(level_grids(grid, tile_shapes(grid, block, levels))[-1]) > 64 * topk:
        levels += 1
    return levels


@dataclass(frozen=True)
class Level:
    """Level l of the tree: its n tokens and the tokens that they cover.

    children: (n, block) tokens of level l - 1 (level 0: positions on the grid), -1 = none.
    place: (n_below,) flat position of each token of level l - 1 in ``children``.
    """

    children: Tensor
    place: Tensor

    @cached_property
    def full(self) -> bool:
        """Whether no block is short."""
        return self.children.numel() == self.place.numel()


@lru_cache(maxsize=64)
def make_tree(grid: tuple[int, ...], block: int, levels: int, device: torch.device) -> tuple[Level, ...]:
    """Build levels 1 … L."""
    shapes = tile_shapes(grid, block, levels)
    grids = level_grids(grid, shapes)[:-1]
    return tuple(Level(*box_blocks(below, shape, device)) for below, shape in zip(grids, shapes, strict=True))
