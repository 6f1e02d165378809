"""SIGINT and SIGTERM in the commands: stop, postpone or ignore."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stopped", "defer_interrupts", "ignore_interrupts", "interruptible", "record_interrupts"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asked to stop; ``status`` is the exit status that shells expect for it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def _stop(number: int, _frame: Any) -> None:
    raise Stopped(number)


@contextmanager
def _handling(handler: Callable[[int, Any], None] | signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may, and gets signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def interruptible() -> Any:
    """Inside, SIGINT and SIGTERM raise :class:`Stopped`, also where a shell started us with SIGINT ignored."""
    return _handling(_stop)


@contextmanager
def record_interrupts() -> Iterator[list[int]]:
    """A SIGINT or SIGTERM that comes inside is only added to the list: for what asks others before it stops."""
    came: list[int] = []
    with _handling(lambda number, _frame: came.append(number)):
        yield came


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """A SIGINT or SIGTERM that comes inside raises :class:`Stopped` at the end: for what must not be done by half."""
    with record_interrupts() as came:
        yield
    if came:
        raise Stopped(came[0])


def ignore_interrupts() -> Any:
    """Inside, SIGINT and SIGTERM are ignored: for the last files to be written whole."""
    return _handling(signal.SIG_IGN)
