"""Options of a mechanism that a search by layer varies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["SearchSpace", "axis_sizes"]

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 16, 20, 24, 32, 48)


@dataclass(frozen=True)
class SearchSpace:
    """Options of one layer that a search varies.

    option: name of the option that is varied. axes: the values that it takes along each axis of the search.
    to_options: the options for one value of each axis. from_processor: the inverse, from a processor.
    """

    option: str
    axes: tuple[Sequence[Any], ...]
    to_options: Callable[..., dict[str, Any]]
    from_processor: Callable[[Any], Sequence[Any]]


def axis_sizes(grid: Sequence[int]) -> tuple[Sequence[int], ...]:
    """Sizes of a window along each axis of a grid, up to the whole axis."""
    return tuple((*(size for size in SIZES if size < length), length) for length in grid)
