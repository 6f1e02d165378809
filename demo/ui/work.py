"""Long work behind a page: in a thread of its own, telling how far it is, and ending when nobody waits for it."""

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
    """What ``work(tell)`` tells, as it tells it; None in quiet times, so that whoever iterates can look up.

    When the iteration is given up, as when the page is closed, ``stop`` is set. What the work raises is raised here.
    """
    told: queue.Queue[Any] = queue.Queue()
    finished = object()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work(told.put)
        except BaseException as error:
            failed.append(error)
        finally:
            told.put(finished)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (event := _next(told)) is not finished:
            yield event
    finally:
        stop.set()
    if failed:
        raise failed[0]


@dataclass(frozen=True)
class Waiting:
    """What is told while others have their turn. before: so many requests."""

    before: int


class Stops:
    """The stop of what each open page is running, so that its cancel button finds it."""

    def __init__(self) -> None:
        self._of_page: dict[str, Stop] = {}

    def begin(self, page: str) -> Stop:
        """A new one; what the page was running before is stopped."""
        self.end(page)
        return self._of_page.setdefault(page, Stop())

    def end(self, page: str) -> None:
        """Stop what the page is running, if anything."""
        stop = self._of_page.pop(page, None)
        if stop is not None:
            stop.set()


def _next(told: queue.Queue[Any]) -> Any:
    try:
        return told.get(timeout=_WAIT_SECONDS)
    except queue.Empty:
        return None


def message_for(error: BaseException) -> str:
    """What a page says of an error: never a stack trace."""
    text = " ".join(str(error).split())
    if isinstance(error, Cancelled):
        return "Stopped."
    if _out_of_memory(error):
        return "Out of memory: this machine cannot hold a drawing of this size. Choose a smaller size or fewer frames."
    if isinstance(error, (ValueError, TypeError, ArithmeticError, FileNotFoundError)) and text:
        return text[:1].upper() + text[1:]
    return f"This did not work: {type(error).__name__}{': ' + text if text else ''}"


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch on the CPU
