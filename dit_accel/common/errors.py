"""Errors that the commands report in one line."""

from __future__ import annotations

__all__ = ["BadInput"]


class BadInput(ValueError):
    """Invalid input; the message says in one line what the user has to change."""
