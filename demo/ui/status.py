"""Status lines of the tabs, as HTML."""

from __future__ import annotations

import html

__all__ = ["duration", "progress_line", "status_line", "waiting_line"]


def status_line(text: str, problem: bool = False) -> str:
    """Status line that screen readers announce; a problem is highlighted."""
    role, kind = ("alert", " class=problem") if problem else ("status", "")
    return f'<div role="{role}"{kind}>{html.escape(text)}</div>'


def waiting_line(before: int) -> str:
    """Status line of a request with ``before`` requests ahead of it."""
    return status_line(f"Waiting: {'one request is' if before == 1 else f'{before} requests are'} before yours.")


def progress_line(text: str, done: float, total: float, label: str) -> str:
    """Status line with a progress bar below it."""
    share = min(max(done / total, 0), 1)
    style = "width: 100%; accent-color: var(--color-accent)"
    bar = f'<progress value="{share:.3f}" max="1" style="{style}" aria-label="{html.escape(label)}"></progress>'
    return status_line(text) + bar


def duration(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
