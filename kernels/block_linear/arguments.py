"""Groups of arguments of the linear attention kernels; see ``kernels/arguments.py``."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["OfQueries", "Static"]


class OfQueries(NamedTuple):
    """What the backward kernel reads and writes for queries only; eps None = for keys. See ``backward_kernel.py``."""

    eps: Any
    quotient: Any
    d_total: Any
    delta: Any


class Static(NamedTuple):
    """Compile-time parameters.

    D, BLOCK_D: head dim, and rounded up to a power of two. BLOCK_E: columns of the state of a program, or per step.
    BLOCK_N: tokens of a block. BOX: shape of a tile. PARTS: blocks per tile. BOXES: how tiles are loaded, see
    ``launch.box_descriptors``. BY_TILE: there is a state for each tile. PRECISION: of products.
    """

    D: int
    BLOCK_D: int
    BLOCK_E: int
    BLOCK_N: int
    BOX: tuple[int, int, int]
    PARTS: int
    FEATURE_MAP: str
    PRECISION: str
    BOXES: str = "none"
    BY_TILE: bool = False
