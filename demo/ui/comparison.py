"""Comparison for the page: dense attention, then another one, with progress reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_accel.comparison.metrics import compare_frames
from dit_accel.comparison.sizes import token_grid
from dit_accel.comparison.students import Student, make_students
from dit_accel.mechanisms.attn_spec import AttentionSpec

from .controls import DrawingOptions, check_fits
from .engine import Drawing, Engine, Loaded, Stop
from .preview import Preview
from .work import Waiting

__all__ = ["Comparison", "Progress", "compare_attention", "python_lines"]

_STEPS_BETWEEN_PREVIEWS = 2


@dataclass(frozen=True)
class Progress:
    """Progress of a comparison.

    drawing: 0 = dense, 1 = the other attention. pictures: previews of both, None for a missing one; None = no change.
    """

    drawing: int
    step: int
    steps: int
    seconds_left: float | None
    pictures: tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None] | None = None


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison."""

    wanted: DrawingOptions
    student: Student
    dense: Drawing
    other: Drawing
    psnr: float | None  # None if the pictures are equal
    ssim: float | None


def compare_attention(
    engine: Engine, wanted: DrawingOptions, spec: AttentionSpec | str, stop: Stop, report: Callable[[Any], None]
) -> None:
    """Draw with dense attention and with ``spec``; report Waiting, Progress and finally the Comparison.

    Raises: what ``Engine.draw`` and ``make_students`` raise; BadInput: a window larger than the grid.
    """
    with engine.turn(wanted.kind, stop, lambda before: report(Waiting(before))) as loaded:
        grid = token_grid(loaded.pipe, wanted.size)
        check_fits(spec, grid)
        (student,) = make_students([spec], loaded.pipe, grid)
        watch = _Watch(loaded, wanted, report)
        dense = engine.draw(loaded, wanted.prompt, wanted.seed, wanted.size, wanted.steps, stop, watch.step)
        watch.next_drawing(dense)
        with student.installed(loaded.pipe):
            other = engine.draw(loaded, wanted.prompt, wanted.seed, wanted.size, wanted.steps, stop, watch.step)
    likeness = compare_frames(other.frames, dense.frames)
    report(Comparison(wanted, student, dense, other, likeness["psnr"], likeness["ssim"]))


class _Watch:
    """Reporter of the steps of both drawings as Progress."""

    def __init__(self, loaded: Loaded, wanted: DrawingOptions, report: Callable[[Any], None]) -> None:
        self.loaded, self.wanted, self.report = loaded, wanted, report
        self.drawing = 0
        self.seconds_of_dense: float | None = None
        self.dense: NDArray[np.uint8] | None = None
        self.preview = Preview(loaded.pipe, wanted.size)
        self.began = time.monotonic()
        report(Progress(0, 0, wanted.steps, None))

    def next_drawing(self, dense: Drawing) -> None:
        now = time.monotonic()
        self.seconds_of_dense, self.began = now - self.began, now
        self.drawing, self.dense = 1, dense.frames[len(dense.frames) // 2]
        self.preview = Preview(self.loaded.pipe, self.wanted.size)
        self.report(Progress(1, 0, self.wanted.steps, self.seconds_of_dense, (self.dense, None)))

    def step(self, step: int, latents: Any) -> None:
        self.preview.update(step, latents)
        steps = self.wanted.steps
        picture = self.preview.picture() if step % _STEPS_BETWEEN_PREVIEWS == 0 and step < steps else None
        pictures = None if picture is None else (picture, None) if self.drawing == 0 else (self.dense, picture)
        each = (time.monotonic() - self.began) / step
        rest = each * (steps - step) + (
            0 if self.drawing else each * steps
        )  # assumes that the other takes as long as dense
        self.report(Progress(self.drawing, step, steps, rest, pictures))


def python_lines(comparison: Comparison, loaded: Loaded) -> str:
    """Python code that draws the other picture."""
    wanted = comparison.wanted
    arguments = {"height": wanted.size.height, "width": wanted.size.width, "num_frames": wanted.size.frames}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    arguments |= {"num_inference_steps": wanted.steps, **loaded.call}
    options = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return "\n".join(
        [
            "import dit_accel, torch",
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({_short_path(loaded.source)!r})",
            attention_line(comparison.student),
            f"seed = torch.Generator().manual_seed({wanted.seed})",
            f"result = pipe({wanted.prompt!r}, generator=seed, {options})",
        ]
    )


def attention_line(student: Student) -> str:
    """Line of Python that installs the attention."""
    if student.source is not None:
        return f"dit_accel.load_attention(pipe, {_short_path(student.source)!r})"
    processor = student.processor
    name, (_, _, options) = type(processor).__name__, str(processor).partition("(")
    return f"pipe.set_attn_processor(dit_accel.{name}({options})"


def _short_path(source: str) -> str:
    """Path relative to the current directory, if it lies below it."""
    path, here = Path(source), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else source
