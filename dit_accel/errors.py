"""Errors that the commands report in one line."""

from __future__ import annotations

__all__ = ["BadInput"]


class BadInput(ValueError):
    """Something that the user has to change; its message says what, in one line."""
