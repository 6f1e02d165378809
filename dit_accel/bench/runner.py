"""What the benchmarks have in common: each row is measured, or says why not, and is on disk before the next begins."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import BadInput
from .progress import Progress
from .request import Request
from .results import Results, Row, about, now
from .timing import TIMING

__all__ = ["Kind", "Runner", "forget", "recording"]


@dataclass(frozen=True)
class Kind:
    """A benchmark: its name in the results, what its figures mean, how a row is called, and what a row has to tell.

    ``summary``: what follows from all rows together, kept beside them.
    """

    name: str
    figures: str
    title: Callable[[Row], str]
    tell: Callable[[Row], str]
    summary: Callable[[list[Row]], Row] = lambda rows: {}


@dataclass
class Runner:
    """A benchmark under way."""

    kind: Kind
    request: Request
    results: Results
    progress: Progress

    def measure(self, row: Row, figures: Callable[[], Row]) -> Row:
        """Add a row with its figures, or with why there are none. Returns: the row."""
        row["date"] = now()
        try:
            row |= {**figures(), "status": "complete"}
        except Exception as error:
            row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        finally:
            forget(self.request.device)
        self.results.add(row)
        failed = row["status"] == "failed"
        told = f"failed: {row['error'].splitlines()[0]}" if failed else self.kind.tell(row)
        self.progress.done(f"{self.kind.title(row)}: {told}")
        return row


@contextmanager
def recording(kind: Kind, request: Request, rows: Collection[Row], **facts: Any) -> Iterator[Runner]:
    """Inside, the rows are measured, one after the other.

    Args:
        rows: what is known of them, at least what names them; earlier results' rows of these names are not kept.
        facts: kept beside the rows.
    Raises:
        BadInput: earlier results that cannot be kept; nothing was measured.
        KeyboardInterrupt: stopped; what was finished is on disk.
    """
    known = about(request.device, request.dtype, list(request.command))
    known |= {"smoke": request.smoke, **facts, "timing": TIMING, "figures": kind.figures}
    results = Results(kind.name, request.out, known, summary=kind.summary)
    if request.keep is not None:
        try:
            results.keep_earlier(request.keep, rows)
        except ValueError as error:
            raise BadInput(str(error)) from None
    with results.recording(), Progress(len(rows)) as progress:
        yield Runner(kind, request, results, progress)


def forget(device: torch.device) -> None:
    """Give back the memory of what is not in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
