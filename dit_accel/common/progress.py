"""The progress bar of all commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["progress_bar"]


def progress_bar(console: Console | None = None, *, disable: bool = False) -> Progress:
    """Progress bar of rich: description, bar, counts, elapsed and remaining time, and the field ``figures`` of a task.

    Args: disable: whether nothing is shown, as in all processes but the main one.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Figures(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(str(task.fields.get("figures", "")))

    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), Figures(), console=console, disable=disable, refresh_per_second=4,
    )  # fmt: skip
