"""After a conversion: the report against the teacher, the model card, the hub."""

from __future__ import annotations

from dataclasses import replace

from accelerate import PartialState
from rich.console import Console

from .card import REPORT, push_to_hub, write_card
from .evaluate import evaluate
from .prepare import only_run_in
from .request import Request

__all__ = ["finish"]

_LEVELS, _PICTURES = 8, 2
_OTHER_SEEDS = 1_000_000  # past those of the samples that were trained on


def finish(request: Request, samples: int, repository: str | None, console: Console) -> None:
    """Compare student and teacher on so many new samples of the teacher (0 = not), write the card, and upload.

    The first process alone does it. A second call does it anew.
    """
    if not PartialState().is_main_process:
        return
    source = request.source
    with only_run_in(source.out, True, console):
        if samples:
            other = replace(
                source, data=None, fps=None, samples=samples, seed=source.seed + _OTHER_SEEDS, out=source.out / REPORT
            )
            evaluate(other, str(source.out), _LEVELS, _PICTURES, console, mixed_precision=request.mixed_precision)
        write_card(source.out)
        if repository is not None:
            console.print(f"Uploaded to {push_to_hub(source.out, repository)}", highlight=False, soft_wrap=True)
