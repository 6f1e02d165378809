"""``dit-accel bench scaling``: LLSA's time over the number of tokens, and the exponent of its growth."""

from __future__ import annotations

from .attention import BACKWARD_FIGURES, measure_cases, result_line, title
from .cases import SCALING
from .request import Request
from .results import Row
from .runner import Kind
from .timing import fit_growth

__all__ = ["EXPONENT", "run", "summarise_growth"]

EXPONENT = 1.15  # goal: the exponent is at most this
_DENSE_MS = 1_000.0  # dense attention is skipped if it is expected to take longer
_RANGES = (0, 131_072)  # fit all sizes, and those with at least this many tokens, where launch overhead is hidden
_FIGURES = BACKWARD_FIGURES + (
    " dense: None if it is expected to take more than a second, extrapolated from the previous size. growth: e of "
    "ours.ms ~ tokens^e, least squares on the logarithms over `sizes` sizes."
)


def run(request: Request) -> int:
    """Measure both passes of each size, smallest first; each row is saved as soon as it is finished.

    Returns: exit status: 0, or 1 if a row failed.
    Raises:
        BadInput: unknown case or backend; nothing was measured.
        KeyboardInterrupt: stopped; finished rows are saved.
    """
    kind = Kind("scaling", _FIGURES, title, result_line, summarise_growth)
    return measure_cases(kind, SCALING, ("forward", "backward"), request, _dense_fits_budget)


def _dense_fits_budget(rows: list[Row], row: Row) -> bool:
    """Whether dense attention is expected to take at most a second, extrapolated from the next smaller size."""
    smaller = [x for x in rows if x["pass"] == row["pass"] and x["tokens"] < row["tokens"] and "ours" in x]
    if not smaller:
        return True
    before = max(smaller, key=lambda x: x["tokens"])
    return before["dense"] is not None and (
        before["dense"]["ms"] * (row["tokens"] / before["tokens"]) ** 2 <= _DENSE_MS
    )


def summarise_growth(rows: list[Row]) -> Row:
    """Exponents of time per pass and backend, if at least three sizes were measured."""
    growth = []
    for which, backend in dict.fromkeys((row["pass"], row["backend"]) for row in rows):
        mine = [row for row in rows if (row["pass"], row["backend"]) == (which, backend) and "ours" in row]
        points = [(row["tokens"], row["ours"]["ms"]) for row in mine]
        fits = [fit_growth([point for point in points if point[0] >= least]) for least in _RANGES]
        for fit in {fit["from"]: fit for fit in fits if fit is not None}.values():
            reached = fit["exponent"] <= EXPONENT
            growth.append({"pass": which, "backend": backend, **fit, "goal": EXPONENT, "reached": reached})
    return {"growth": growth}
