"""Choice of the cases that ``make test`` runs. The others have the marker `sweep` and run with ``make test-all``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def keep(cases: Iterable[Any], chosen: Callable[[Any], bool]) -> list[Any]:
    """Mark the cases that are not chosen."""
    return [case if chosen(case) else _swept(case) for case in cases]


def cover(cases: Iterable[tuple], properties: Callable[..., Iterable[Any]], each: bool = True) -> list[Any]:
    """Mark the cases that are not needed for pairwise coverage.

    Each pair of properties that occurs in any case occurs in one that is not marked, and with ``each``, so does each
    first value of a case. The choice is greedy, the first of equal ones, and therefore always the same.
    """
    cases = list(cases)
    pairs = [set(itertools.combinations(enumerate(properties(*case)), 2)) for case in cases]
    if each:
        pairs = [{*found, (case[0],)} for found, case in zip(pairs, cases, strict=True)]
    missing, chosen = set().union(*pairs), set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [case if i in chosen else _swept(case) for i, case in enumerate(cases)]


def _swept(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.sweep)
