"""The progress bar of the commands."""

from __future__ import annotations

import io

from rich.console import Console

from dit_accel.common.progress import progress_bar


def drawn(**options):
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=True, color_system=None)
    with progress_bar(console, **options) as progress:
        task = progress.add_task("samples [x]", total=3, figures="loss [0.5]")
        progress.add_task("pictures", total=1)
        progress.advance(task)
    return output.getvalue()


def test_bar_shows_counts_and_figures_without_markup():
    text = drawn()
    assert "samples [x]" in text and "1/3" in text and "loss [0.5]" in text and "pictures" in text


def test_disabled_bar_shows_nothing():
    assert "samples" not in drawn(disable=True)
