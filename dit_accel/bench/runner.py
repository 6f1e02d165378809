"""Runner of all benchmarks: measures rows in order, and saves figures or error of each before the next one starts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..common.errors import BadInput
from .progress import Progress
from .request import Request
from .results import Results, Row, about, now
from .timing import TIMING

__all__ = ["Kind", "Runner", "free_memory", "open_runner"]


@dataclass(frozen=True)
class Kind:
    """Definition of a benchmark.

    Args:
        name: name in the results.
        figures: explanation of the figures.
        title: name of a row for progress messages.
        result_line: results of a row in one line.
        summary: additional entries of the results, computed from all rows.
    """

    name: str
    figures: str
    title: Callable[[Row], str]
    result_line: Callable[[Row], str]
    summary: Callable[[list[Row]], Row] = lambda rows: {}


@dataclass
class Runner:
    """A running benchmark."""

    kind: Kind
    request: Request
    results: Results
    progress: Progress

    def measure(self, row: Row, figures: Callable[[], Row]) -> Row:
        """Compute the figures of a row and add it; if that fails, add it with the error. Returns: the row."""
        row["date"] = now()
        try:
            row |= {**figures(), "status": "complete"}
        except Exception as error:
            row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        finally:
            free_memory(self.request.device)
        self.results.add(row)
        failed = row["status"] == "failed"
        line = f"failed: {row['error'].splitlines()[0]}" if failed else self.kind.result_line(row)
        self.progress.done(f"{self.kind.title(row)}: {line}")
        return row


@contextmanager
def open_runner(kind: Kind, request: Request, rows: Collection[Row], **facts: Any) -> Iterator[Runner]:
    """Context with a runner for these rows.

    Args:
        rows: the rows to measure, at least their keys (``KEYS``); earlier results with the same keys are dropped.
        facts: additional entries of the results.
    Raises:
        BadInput: earlier results that do not match this run; nothing was measured.
        KeyboardInterrupt: stopped; finished rows are saved.
    """
    known = about(request.device, request.dtype, list(request.command))
    known |= {"smoke": request.smoke, **facts, "timing": TIMING, "figures": kind.figures}
    results = Results(kind.name, request.out, known, summary=kind.summary)
    if request.keep is not None:
        try:
            results.keep_earlier(request.keep, rows)
        except ValueError as error:
            raise BadInput(str(error)) from None
    with results.track_status(), Progress(len(rows)) as progress:
        yield Runner(kind, request, results, progress)


def free_memory(device: torch.device) -> None:
    """Free unused memory, including torch's CUDA cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
