"""Progress of a benchmark: a bar if rich is installed, else plain lines."""

from __future__ import annotations

import importlib.util
from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """Progress display: ``with Progress(total) as progress: progress.doing("task"); progress.done("result")``."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.finished = 0
        self._bar: Any = None
        if importlib.util.find_spec("rich") is not None:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False), refresh_per_second=2,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total)

    def doing(self, what: str) -> None:
        """Show the current task."""
        if self._bar is None:
            print(f"[{self.finished + 1}/{self.total}] {what} …", flush=True)
        else:
            self._bar.update(self._task, description=what)

    def done(self, line: str) -> None:
        """Count one task as finished and print a line."""
        self.finished += 1
        self.say(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.finished, description="")

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
            self._bar.update(self._task, description="")
            self._bar.stop()
