"""What a conversion and its evaluation begin with: the pipeline's call, samples, and progress."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from ..compare.sizes import Size, check_size, default_size, token_grid
from ..embedded import read_defaults
from ..install import denoisers
from .request import Source
from .samples import Sample, SampleCache, find_pictures, read_sample

__all__ = ["make_samples", "only_denoiser", "pipeline_call", "progress_bar", "put_away"]


def only_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """The pipeline's denoiser and the name of its component.

    Raises: ValueError: it has several.
    """
    found = denoisers(pipe)
    if len(found) != 1:
        raise ValueError(f"{type(pipe).__name__} has several denoisers ({', '.join(found)}): one is expected here")
    return next(iter(found.items()))


def pipeline_call(source: Source, pipe: Any) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """What the pipeline is called with but for the prompt, and the token grid.

    Raises: ValueError: a size that it cannot draw, or none is known.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    call = {key: x for key, x in read_defaults(source.pipeline).items() if key in parameters}
    own = default_size(pipe) or Size(0, 0)
    size = Size(
        source.height or call.get("height", own.height),
        source.width or call.get("width", own.width),
        source.frames or call.get("num_frames", own.frames),
    )
    if not size.height or not size.width:
        raise ValueError(f"{type(pipe).__name__} does not say what size it draws; give --height and --width")
    check_size(pipe, size)
    call |= {"height": size.height, "width": size.width}
    if size.frames is not None:
        call["num_frames"] = size.frames
    return call, token_grid(pipe, size)


def make_samples(
    source: Source, accelerator: Accelerator, pipe: Any, model: nn.Module, call: dict[str, Any], console: Console
) -> list[Sample]:
    """The samples; the first process makes what is not in the folder yet.

    Raises: ValueError: there is no data that the pipeline takes.
    """
    files: list[Path] = []
    pictures, without = find_pictures(source.data) if source.data is not None else ([], 0)
    if pictures and "num_frames" in call:
        raise ValueError(f"{type(pipe).__name__} draws clips: --data takes pictures, use --data-free")
    if without:
        console.print(f"{without} pictures without a caption are left out", highlight=False)
    cache = SampleCache(source.out / "samples", pipe, model, call)
    with accelerator.main_process_first(), progress_bar(console, accelerator) as progress:
        task = progress.add_task("samples", total=len(pictures) or source.samples, told="")

        def note() -> None:
            progress.advance(task)

        if source.data is not None:
            files = cache.from_pictures(pictures, note)
        else:
            files = cache.from_teacher(source.prompts, source.samples, source.seed, note)
    if cache.skipped and accelerator.is_main_process:
        console.print(
            f"{len(cache.skipped)} pictures that cannot be read are left out: samples/skipped.json says which"
        )
    return [read_sample(path) for path in files]


def put_away(pipe: Any, component: str) -> None:
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
