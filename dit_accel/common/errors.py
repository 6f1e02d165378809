"""Errors that the commands report in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["BadInput", "Diverged", "as_bad_input"]


class BadInput(ValueError):
    """Invalid input; the message says in one line what the user has to change."""


class Diverged(RuntimeError):
    """The loss became NaN or infinite."""


@contextmanager
def as_bad_input() -> Iterator[None]:
    """Context that raises each ``ValueError`` as :class:`BadInput`."""
    try:
        yield
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(str(error)) from None
