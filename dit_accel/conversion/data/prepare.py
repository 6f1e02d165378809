"""Set-up shared by conversion and evaluation: the folder's lock, the denoiser and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from torch import distributed, nn

from dit_accel.common.errors import BadInput
from dit_accel.common.files import locked, remove_leftovers
from dit_accel.common.progress import progress_bar
from dit_accel.install.installation import denoisers

from ..request import Source
from .buckets import Bucket, frame_rate
from .dataset import Folder, Shards, find_data
from .samples import SampleCache, Samples

__all__ = ["lock_for_run", "make_samples", "offload_unused_components", "only_denoiser"]


@contextmanager
def lock_for_run(folder: Path, main_process: bool, console: Console) -> Iterator[None]:
    """Lock the folder for this run and remove temporary files of killed runs; the main process does both.

    Raises: BadInput: another run holds the lock.
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
    """Name and module of the pipeline's denoiser.

    Raises: ValueError: the pipeline has several.
    """
    found = denoisers(pipe)
    if len(found) != 1:
        raise ValueError(
            f"expected a pipeline with one denoiser, got {type(pipe).__name__} with {len(found)}: {', '.join(found)}"
        )
    return next(iter(found.items()))


def make_samples(
    source: Source, accelerator: Accelerator, pipe: Any, model: nn.Module, buckets: Sequence[Bucket], console: Console,
    tell: Callable[[int, int | None], None] | None = None,
) -> Samples:  # fmt: skip
    """The samples of a source; the main process makes those that are not in the folder yet.

    Args: tell: called after each sample with the number of samples so far and the total (None: unknown).
    Raises: ValueError: there is no data that the pipeline can use.
    """
    files: list[Path] = []
    clips, fps = buckets[0].size.frames is not None, frame_rate(source, pipe)
    data = None if source.data is None else find_data(source.data, clips, type(pipe).__name__)
    cache = SampleCache(source.out / "samples", pipe, model, buckets, {"pipeline": source.pipeline, "fps": fps})
    # The evaluation after training also runs in the main process alone.
    alone = not (distributed.is_available() and distributed.is_initialized())
    bar = progress_bar(console, disable=not accelerator.is_main_process)
    with nullcontext() if alone else accelerator.main_process_first(), bar as progress:
        total = source.samples if data is None else data.total
        task = progress.add_task("samples", total=total)

        def note() -> None:
            progress.advance(task)
            if tell is not None:
                tell(int(progress.tasks[task].completed), total)

        if data is not None:
            files = cache.from_data(data, fps, note)
        else:
            files = cache.from_teacher(source.prompts, source.samples, source.seed, note)
    if data is not None and accelerator.is_main_process:
        for line in _skipped_lines(data, cache):
            console.print(line, highlight=False)
    return Samples(files)


def _skipped_lines(data: Folder | Shards, cache: SampleCache) -> Iterator[str]:
    """One line per reason for which examples were skipped."""
    kind, other = ("clips", "pictures") if data.clips else ("pictures", "clips")
    if data.others:
        yield f"Skipped {data.others} {other}: {data.drawer} draws {kind}"
    if data.without:
        yield f"Skipped {data.without} {kind} without a caption"
    for why, count in cache.why.items():
        yield f"Skipped {count} {kind} that {why}, listed in samples/skipped.json"
    if data.broken:
        yield f"Skipped {len(data.broken)} shards or samples that cannot be read, listed in samples/skipped.json"


def offload_unused_components(pipe: Any, component: str) -> None:
    """Move every component except the denoiser to the CPU, which frees device memory for training."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name != component:
            part.to("cpu")
