"""Long-running work of a page in its own thread, with progress events, cancelled when the page is closed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .engine import Cancelled, Stop

__all__ = ["Stops", "Waiting", "message_for", "stream"]

_WAIT_SECONDS = 0.25


def stream(work: Callable[[Callable[[Any], None]], None], stop: Stop) -> Iterator[Any]:
    """Yield the events that ``work(report)`` reports; None if there is no event for 0.25 s.

    ``stop`` is set when the iteration ends, also early, as when the page is closed. Exceptions of the work are raised
    here.
    """
    events: queue.Queue[Any] = queue.Queue()
    finished = object()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work(events.put)
        except BaseException as error:
            failed.append(error)
        finally:
            events.put(finished)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (event := _next(events)) is not finished:
            yield event
    finally:
        stop.set()
    if failed:
        raise failed[0]


@dataclass(frozen=True)
class Waiting:
    """Event of a request that waits for its turn. before: number of requests ahead."""

    before: int


class Stops:
    """Stop flag of the running request of each open page, for its cancel button."""

    def __init__(self) -> None:
        self._of_page: dict[str, Stop] = {}

    def begin(self, page: str) -> Stop:
        """Return a new flag; the page's previous request is stopped."""
        self.end(page)
        return self._of_page.setdefault(page, Stop())

    def end(self, page: str) -> None:
        """Stop the page's running request, if any."""
        stop = self._of_page.pop(page, None)
        if stop is not None:
            stop.set()


def _next(events: queue.Queue[Any]) -> Any:
    try:
        return events.get(timeout=_WAIT_SECONDS)
    except queue.Empty:
        return None


def message_for(error: BaseException) -> str:
    """Message for the page, without a stack trace."""
    text = " ".join(str(error).split())
    if isinstance(error, Cancelled):
        return "Stopped."
    if _out_of_memory(error):
        return "Out of memory for a drawing of this size. Choose a smaller size or fewer frames."
    if isinstance(error, (ValueError, TypeError, ArithmeticError, FileNotFoundError)) and text:
        return text[:1].upper() + text[1:]
    return f"This did not work: {type(error).__name__}{': ' + text if text else ''}"


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch on the CPU
