"""Token layout: which tokens of a sequence form the grid of an image or video, and which are global."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["TokenLayout"]


def _is_int(value: object) -> bool:
    """Return whether the value is an int or a symbolic int of torch; False for bool."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


@dataclass(frozen=True)
class TokenLayout:
    """Layout of a sequence ``[before | grid tokens, row-major | after]``.

    Tokens that are not on the grid (text, padding to a multiple, reference images) are *global*: they attend to every
    token, and every token attends to them.

    Args:
        grid: axis lengths, slowest first: ``(N,)``, ``(H, W)`` or ``(T, H, W)``.
        before: number of global tokens before the grid.
        after: number of global tokens after it.
        references: grids of reference images (Flux Kontext); their tokens are the first of ``after``, in order.

    Raises:
        TypeError: a length that is not an integer.
        ValueError: a grid with no axis or more than three, an axis shorter than 1, a negative count, or references
            with more tokens than ``after``.
    """

    grid: tuple[int, ...]
    before: int = 0
    after: int = 0
    references: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "references", tuple(tuple(grid) for grid in self.references))
        if torch.compiler.is_compiling():  # symbolic lengths: a comparison here would become a guard
            return
        if not all(_is_int(n) for n in (*self.grid, self.before, self.after)):
            raise TypeError(
                f"TokenLayout expects integers, got grid={self.grid}, before={self.before!r}, after={self.after!r}"
            )
        if not 1 <= len(self.grid) <= 3:
            raise ValueError(f"TokenLayout grid must have 1, 2 or 3 axes, got {len(self.grid)}: {self.grid}")
        if min(self.grid) < 1:
            raise ValueError(f"TokenLayout grid axes must be at least 1 long, got {self.grid}")
        if self.before < 0 or self.after < 0:
            raise ValueError(f"TokenLayout before and after must not be negative, got {self.before} and {self.after}")
        if sum(math.prod(grid) for grid in self.references) > self.after:
            raise ValueError(f"TokenLayout references {self.references} have more tokens than after={self.after}")

    @property
    def grid_len(self) -> int:
        """Number of grid tokens."""
        return math.prod(self.grid)

    @property
    def seq_len(self) -> int:
        """Number of tokens in the sequence, the S of ``(B, H, S, D)``."""
        return self.before + self.grid_len + self.after

    @property
    def grid_slice(self) -> slice:
        """Slice of the sequence that holds the grid tokens."""
        return slice(self.before, self.before + self.grid_len)

    def coordinates(self, token: int) -> tuple[int, ...] | None:
        """Return the grid coordinates of a token, slowest axis first; None for a global token.

        Raises: IndexError: a token outside ``[0, seq_len)``.
        """
        if not 0 <= token < self.seq_len:
            raise IndexError(f"token {token} is outside the sequence of {self.seq_len} tokens")
        rest = token - self.before
        if not 0 <= rest < self.grid_len:
            return None
        coordinates = []
        for length in reversed(self.grid):
            rest, x = divmod(rest, length)
            coordinates.append(x)
        return tuple(reversed(coordinates))

    def token(self, coordinates: tuple[int, ...]) -> int:
        """Return the index of the token at these grid coordinates (inverse of :meth:`coordinates`).

        Raises: ValueError: wrong number of coordinates; IndexError: a coordinate outside its axis.
        """
        if len(coordinates) != len(self.grid):
            raise ValueError(f"expected {len(self.grid)} coordinates for grid {self.grid}, got {tuple(coordinates)}")
        index = 0
        for x, length in zip(coordinates, self.grid, strict=True):
            if not 0 <= x < length:
                raise IndexError(f"coordinates {tuple(coordinates)} are outside grid {self.grid}")
            index = index * length + x
        return self.before + index

    def __str__(self) -> str:
        text = "×".join(str(n) for n in self.grid)
        return f"{self.before}+{text}+{self.after}" if self.before or self.after else text
