"""Progress of a benchmark: a bar if rich is installed, else plain lines."""

from __future__ import annotations

import importlib.util
from types import TracebackType
from typing import Any

from ..common.progress import progress_bar

__all__ = ["Progress"]


class Progress:
    """Progress display: ``with Progress(total) as progress: progress.doing("task"); progress.done("result")``."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.finished = 0
        self._bar: Any = None
        if importlib.util.find_spec("rich") is not None:
            self._bar = progress_bar()
            self._task = self._bar.add_task("bench", total=total)

    def doing(self, what: str) -> None:
        """Show the current task."""
        if self._bar is None:
            print(f"[{self.finished + 1}/{self.total}] {what} …", flush=True)
        else:
            self._bar.update(self._task, figures=what)

    def done(self, line: str) -> None:
        """Count one task as finished and print a line."""
        self.finished += 1
        self.say(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.finished, figures="")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.update(self._task, figures="")
            self._bar.stop()
