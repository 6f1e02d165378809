"""Tiles of a grid: compact boxes of tokens instead of consecutive tokens in raster order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["box_blocks", "box_grid", "box_shape", "box_table"]

# tile shapes of the SLA authors' kernels and of ours
NAMED = {(64, 2): (8, 8), (64, 3): (4, 4, 4), (128, 2): (8, 16), (128, 3): (2, 8, 8)}


def box_shape(volume: int, grid: Sequence[int]) -> tuple[int, ...]:
    """Sides of a tile of ``volume`` tokens; axes of length one are not cut."""
    axes = [i for i, n in enumerate(grid) if n > 1]
    sides = [1] * len(grid)
    if not axes:
        return tuple(sides)
    shape = NAMED.get((volume, len(axes)))
    if shape is None:
        shape = min(factorisations(volume, len(axes)), key=lambda s: (max(s) / min(s), s))
    for axis, side in zip(axes, shape, strict=True):
        sides[axis] = side
    return tuple(sides)


@lru_cache(maxsize=256)
def factorisations(volume: int, axes: int) -> tuple[tuple[int, ...], ...]:
    """All ways to write ``volume`` as a product of ``axes`` ordered factors."""
    return tuple(_factorisations(volume, axes))


def _factorisations(volume: int, axes: int) -> Iterator[tuple[int, ...]]:
    if axes == 1:
        yield (volume,)
        return
    for side in range(1, volume + 1):
        if volume % side == 0:
            for rest in _factorisations(volume // side, axes - 1):
                yield (side, *rest)


def box_grid(grid: Sequence[int], box: Sequence[int]) -> tuple[int, ...]:
    """Number of tiles along each axis; those at the far edges may be short."""
    return tuple(-(-n // side) for n, side in zip(grid, box, strict=True))


def box_table(grid: Sequence[int], box: Sequence[int], device: torch.device) -> Tensor:
    """Raster indices of the cells in each tile, (tiles, volume of a tile), tiles in raster order; -1 off the grid."""
    index = torch.arange(math.prod(grid), device=device).view(tuple(grid))
    far = [(0, -n % side) for n, side in zip(grid, box, strict=True)]
    index = torch.nn.functional.pad(index, tuple(itertools.chain(*reversed(far))), value=-1)
    split = list(itertools.chain(*zip(box_grid(grid, box), box, strict=True)))
    axes = len(box)
    order = [*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)]
    # contiguous, because kernels do not read the strides of what is a view on some grids
    return index.reshape(split).permute(order).reshape(-1, math.prod(box)).contiguous()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def box_blocks(grid: tuple[int, ...], box: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """:func:`box_table`, and the flat position of each cell of the grid in it, (cells,)."""
    table = box_table(grid, box, device)
    flat = table.flatten()
    on_grid = (flat >= 0).nonzero()[:, 0]
    place = torch.empty_like(on_grid)
    place[flat[on_grid]] = on_grid
    return table, place
