"""``dit-accel bench scaling``: LLSA's time against the number of tokens, and the exponent that it grows with."""

from __future__ import annotations

from .attention import BACKWARD_FIGURES, measure_cases, tell, title
from .cases import SCALING
from .request import Request
from .results import Row
from .runner import Kind
from .timing import fit_growth

__all__ = ["EXPONENT", "run", "summarise_growth"]

EXPONENT = 1.15  # the most that is to come out
_DENSE_MS = 1_000.0  # dense attention is measured as long as it should take no more
_RANGES = (0, 131_072)  # exponents over all sizes, and from so many tokens on: there the host takes less than the GPU
_FIGURES = BACKWARD_FIGURES + (
    " dense: None where it would take more than a second, by its time at the size before. growth: e of ours.ms ~ "
    "tokens^e, by least squares on the logarithms over so many sizes."
)


def run(request: Request) -> int:
    """Measure both passes of every size, the smallest first; every finished one is on disk at once.

    Returns: exit status: 0, or 1 if one failed.
    Raises:
        BadInput: unknown case or backend; nothing was measured.
        KeyboardInterrupt: stopped; what was finished is on disk.
    """
    kind = Kind("scaling", _FIGURES, title, tell, summarise_growth)
    return measure_cases(kind, SCALING, ("forward", "backward"), request, _dense_is_quick)


def _dense_is_quick(rows: list[Row], row: Row) -> bool:
    """Whether dense attention should take no more than a second, by the largest smaller size that was measured."""
    smaller = [x for x in rows if x["pass"] == row["pass"] and x["tokens"] < row["tokens"] and "ours" in x]
    if not smaller:
        return True
    before = max(smaller, key=lambda x: x["tokens"])
    return before["dense"] is not None and (
        before["dense"]["ms"] * (row["tokens"] / before["tokens"]) ** 2 <= _DENSE_MS
    )


def summarise_growth(rows: list[Row]) -> Row:
    """Exponents of time by pass and backend, where three sizes were measured."""
    growth = []
    for which, backend in dict.fromkeys((row["pass"], row["backend"]) for row in rows):
        mine = [row for row in rows if (row["pass"], row["backend"]) == (which, backend) and "ours" in row]
        points = [(row["tokens"], row["ours"]["ms"]) for row in mine]
        fits = [fit_growth([point for point in points if point[0] >= least]) for least in _RANGES]
        for fit in {fit["from"]: fit for fit in fits if fit is not None}.values():
            reached = fit["exponent"] <= EXPONENT
            growth.append({"pass": which, "backend": backend, **fit, "goal": EXPONENT, "reached": reached})
    return {"growth": growth}
