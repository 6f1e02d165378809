# mypy: allow-untyped-defs, allow-incomplete-defs
"""Positions in the sequence of the tokens of a tile, for Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load_box", "tile_places", "tile_size", "tile_tokens"]


@triton.jit
def tile_places(tile, lane, G0, G1, G2, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr):
    """Position along each axis of each lane of a tile, and whether it is valid: lanes past the tile or the grid's edge
    are not. ``lane`` may be a block of any shape."""
    n1 = tl.cdiv(G1, B1)
    n2 = tl.cdiv(G2, B2)
    x0 = tile // (n1 * n2) * B0 + lane // (B1 * B2)
    x1 = tile // n2 % n1 * B1 + lane // B2 % B1
    x2 = tile % n2 * B2 + lane % B2
    return x0, x1, x2, (lane < B0 * B1 * B2) & (x0 < G0) & (x1 < G1) & (x2 < G2)


@triton.jit
def tile_tokens(tile, lane, G0, G1, G2, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr):
    """Raster index on the grid of each lane of a tile, and whether it is valid (if not, the index is 0)."""
    x0, x1, x2, valid = tile_places(tile, lane, G0, G1, G2, B0, B1, B2)
    return tl.where(valid, (x0 * G1 + x1) * G2 + x2, 0), valid


@triton.jit
def tile_size(tile, G0, G1, G2, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr):
    """Number of tokens of a tile: fewer at the grid's far edges."""
    n1 = tl.cdiv(G1, B1)
    n2 = tl.cdiv(G2, B2)
    side0 = tl.minimum(G0 - tile // (n1 * n2) * B0, B0)
    side1 = tl.minimum(G1 - tile // n2 % n1 * B1, B1)
    return side0 * side1 * tl.minimum(G2 - tile % n2 * B2, B2)


@triton.jit
def load_box(DESC, BOXES: tl.constexpr, i_b, i_h, n_heads, tile, part, G1, G2, B0: tl.constexpr, B1: tl.constexpr,
             B2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Load a tile, or a part of one, (BLOCK_N, BLOCK_D), through a descriptor of ``launch.box_descriptors``; zeros off
    the grid."""
    n1 = tl.cdiv(G1, B1)
    n2 = tl.cdiv(G2, B2)
    x0 = tile // (n1 * n2) * B0
    x1 = tile // n2 % n1 * B1
    x2 = tile % n2 * B2
    if BLOCK_N < B0 * B1 * B2:
        lane = part * BLOCK_N
        x0 += lane // (B1 * B2)
        x1 += lane // B2 % B1
        x2 += lane % B2
    if BOXES == 1:
        return DESC.load([i_b * n_heads + i_h, x0, x1, x2, 0]).reshape(BLOCK_N, BLOCK_D)
    return DESC.load([i_b, i_h, x1, x2, 0]).reshape(BLOCK_N, BLOCK_D)
