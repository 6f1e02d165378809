"""What a conversion and its evaluation begin with: its samples, and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import distributed, nn

from ..errors import BadInput
from ..files import locked, remove_leftovers
from ..install import denoisers
from .buckets import Bucket, frame_rate
from .data import Folder, Shards, find_data
from .request import Source
from .samples import SampleCache, Samples

__all__ = ["make_samples", "offload_unused_components", "only_denoiser", "only_run_in", "progress_bar"]


@contextmanager
def only_run_in(folder: Path, main_process: bool, console: Console) -> Iterator[None]:
    """Lock the folder for this run, in its first process for all of them, and remove what killed runs left there.

    Raises: BadInput: another run holds it.
    """
    with ExitStack() as stack:
        if main_process:
            try:
                stack.enter_context(locked(folder, lambda text: console.print(text, highlight=False, soft_wrap=True)))
            except ValueError as error:
                raise BadInput(str(error)) from error
            remove_leftovers(folder, folder / "pictures")
        yield


def only_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """The pipeline's denoiser and the name of its component.

    Raises: ValueError: it has several.
    """
    found = denoisers(pipe)
    if len(found) != 1:
        raise ValueError(f"{type(pipe).__name__} has several denoisers ({', '.join(found)}): one is expected here")
    return next(iter(found.items()))


def make_samples(
    source: Source, accelerator: Accelerator, pipe: Any, model: nn.Module, buckets: Sequence[Bucket], console: Console,
    tell: Callable[[int, int | None], None] | None = None,
) -> Samples:  # fmt: skip
    """The samples; the first process makes what is not in the folder yet, and tells how many of how many (None: not
    known) are there.

    Raises: ValueError: there is no data that the pipeline takes.
    """
    files: list[Path] = []
    clips, fps = buckets[0].size.frames is not None, frame_rate(source, pipe)
    data = None if source.data is None else find_data(source.data, clips, type(pipe).__name__)
    cache = SampleCache(source.out / "samples", pipe, model, buckets, {"pipeline": source.pipeline, "fps": fps})
    alone = not (distributed.is_available() and distributed.is_initialized())  # so is the first one in its last report
    with nullcontext() if alone else accelerator.main_process_first(), progress_bar(console, accelerator) as progress:
        total = source.samples if data is None else data.total
        task = progress.add_task("samples", total=total, told="")

        def note() -> None:
            progress.advance(task)
            if tell is not None:
                tell(int(progress.tasks[task].completed), total)

        if data is not None:
            files = cache.from_data(data, fps, note)
        else:
            files = cache.from_teacher(source.prompts, source.samples, source.seed, note)
    if data is not None and accelerator.is_main_process:
        for line in _left_out(data, cache):
            console.print(line, highlight=False)
    return Samples(files)


def _left_out(data: Folder | Shards, cache: SampleCache) -> Iterator[str]:
    """A line for each reason that there was."""
    kind, other = ("clips", "pictures") if data.clips else ("pictures", "clips")
    if data.others:
        yield f"{data.others} {other} are left out: {data.drawer} draws {kind}"
    if data.without:
        yield f"{data.without} {kind} without a caption are left out"
    for why, count in cache.why.items():
        yield f"{count} {kind} that {why} are left out: samples/skipped.json says which"
    if data.broken:
        yield f"{len(data.broken)} shards or samples in them cannot be read: samples/skipped.json says which"


def offload_unused_components(pipe: Any, component: str) -> None:
    """What is not needed any more makes room."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name != component:
            part.to("cpu")


def progress_bar(console: Console, accelerator: Accelerator) -> Progress:
    """Steps done, time taken and left, and a line of figures (``told``); on the first process."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"), console=console, disable=not accelerator.is_main_process,
    )  # fmt: skip
