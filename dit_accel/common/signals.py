"""Handling of SIGINT and SIGTERM in the commands: stop, defer or ignore."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stopped", "defer_interrupts", "ignore_interrupts", "interruptible", "record_interrupts"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Raised on SIGINT or SIGTERM; ``status`` is the exit status by shell convention, 128 plus the signal number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def _stop(number: int, _frame: Any) -> None:
    raise Stopped(number)


@contextmanager
def _handling(handler: Callable[[int, Any], None] | signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def interruptible() -> Any:
    """Context in which SIGINT and SIGTERM raise :class:`Stopped`, even if the shell started the process with SIGINT
    ignored."""
    return _handling(_stop)


@contextmanager
def record_interrupts() -> Iterator[list[int]]:
    """Append each SIGINT or SIGTERM to the list instead of raising, so that the caller chooses when to stop."""
    received: list[int] = []
    with _handling(lambda number, _frame: received.append(number)):
        yield received


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Defer SIGINT and SIGTERM: :class:`Stopped` is raised at the end of the block, which is never cut short."""
    with record_interrupts() as received:
        yield
    if received:
        raise Stopped(received[0])


def ignore_interrupts() -> Any:
    """Context that ignores SIGINT and SIGTERM, for writing the last files of a run."""
    return _handling(signal.SIG_IGN)
