"""Steps after training: evaluation against the teacher, model card, upload to the hub."""

from __future__ import annotations

from dataclasses import replace

from accelerate import PartialState
from rich.console import Console

from .card import REPORT, push_to_hub, write_card
from .data.prepare import lock_for_run
from .evaluate import evaluate
from .request import Request

__all__ = ["finish"]

_OTHER_SEEDS = 1_000_000  # beyond the seeds of the training samples


def finish(request: Request, samples: int, repository: str | None, console: Console) -> None:
    """Evaluate the student on new samples of the teacher, write the model card and upload the result.

    Only the main process does this. A second call repeats it.

    Args: samples: number of new samples; 0 skips the evaluation. repository: hub id to upload to; None: no upload.
    """
    if not PartialState().is_main_process:
        return
    source = request.source
    with lock_for_run(source.out, True, console):
        if samples:
            other = replace(
                source, data=None, fps=None, samples=samples, seed=source.seed + _OTHER_SEEDS, out=source.out / REPORT
            )
            evaluate(other, str(source.out), console, mixed_precision=request.mixed_precision)
        write_card(source.out)
        if repository is not None:
            console.print(f"Uploaded to {push_to_hub(source.out, repository)}", highlight=False, soft_wrap=True)
