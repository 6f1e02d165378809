"""Arguments of the Triton kernels, in groups.

A group is a NamedTuple of tensors and numbers: Triton passes it to a kernel, and from one function of a kernel to
another, under its names. A tensor of a group may be None: the kernel is then compiled without it. Compile-time
parameters form one more NamedTuple for each operation. A group holds no other group: Triton 3.6 loses None and 1, which
are constants, from a group within a group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Mask", "Rows", "Tokens", "mask_of", "rows_of"]


class Rows(NamedTuple):
    """(B, H, S, D) tensor with unit stride along D, and its other strides."""

    data: Any
    batch: int
    head: int
    row: int


class Mask(NamedTuple):
    """(B, S) bool tensor, True = attend, and its strides."""

    data: Any
    batch: int
    row: int


class Tokens(NamedTuple):
    """Sequence of ``length`` tokens ``[before | grid | after]``, and the sides of the grid."""

    length: int
    before: int
    g0: int
    g1: int
    g2: int


def rows_of(x: Tensor | None) -> Rows:
    """Group of a (B, H, S, D) tensor; None = absent."""
    return Rows(None, 0, 0, 0) if x is None else Rows(x, *x.stride()[:3])


def mask_of(x: Tensor | None) -> Mask:
    """Group of a (1|B, S) mask; a mask of one batch element is that of all. None = attend to all."""
    if x is None:
        return Mask(None, 0, 0)
    return Mask(x, x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))
