"""How far a benchmark is: a bar where rich is installed, plain lines where it is not."""

from __future__ import annotations

import importlib.util
from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """``with Progress(total) as progress: progress.doing("what"); progress.done("what came out")``."""

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
        """What is being measured now."""
        if self._bar is None:
            print(f"[{self.finished + 1}/{self.total}] {what} …", flush=True)
        else:
            self._bar.update(self._task, description=what)

    def done(self, line: str) -> None:
        """One of the total is finished; the line stays."""
        self.finished += 1
        self.say(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.finished, description="")

    def say(self, line: str) -> None:
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
