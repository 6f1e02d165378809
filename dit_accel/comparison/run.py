"""Generate the same prompts with dense attention and each mechanism, time the denoiser, and show all side by side."""

from __future__ import annotations

import datetime
import inspect
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from ..common.bundled import IMAGE, VIDEO, prompts_of
from ..common.environment import about_machine, about_versions
from ..common.errors import BadInput
from ..common.pipeline_loading import load_pipeline
from ..common.progress import progress_bar
from ..common.signals import ignore_interrupts
from ..install.describe import describe
from ..install.installation import denoisers
from .calling import average_logit_fraction, default_call, to_frames
from .metrics import compare_frames, lpips_weights
from .report import Picture, Report, Variant, figure
from .request import Request
from .sheet import Sheet, contact_cell, save_clip, save_image, sheet_frames
from .sizes import Size, check_size, token_grid
from .step_timer import StepTimer
from .students import Student, make_students

__all__ = ["run"]

_FPS = 16
_MAX_DRIFT = 1.25  # warn if the time of dense changes by more than this factor during a run
_TIMING = (
    "seconds_per_step: median over the denoising steps of the time in the denoiser's forward pass (all calls of a "
    "step, such as two with guidance), synchronised before and after, after one untimed warm-up step per variant; "
    "excludes text encoder, scheduler and VAE. times_dense: dense's seconds_per_step / this variant's, same prompt and "
    "run. dense_again: dense measured again at the end, to detect other load on the machine. logit_fraction: unmasked "
    "logits / dense attention's logits, over all self-attention layers and steps. psnr, ssim, lpips: of the 8-bit "
    "frames against dense's with the same prompt and seed, mean over frames; psnr is null if the frames are equal."
)


@dataclass
class Comparison:
    """A loaded pipeline, the options of the run, and the pictures drawn so far."""

    request: Request
    pipe: Any
    size: Size
    steps: int
    call: dict[str, Any]  # arguments of the pipeline call, except prompt, steps and seed
    students: list[Student | None]  # parallel to report.variants; None: dense
    report: Report
    drawn: dict[tuple[int, int], NDArray[np.uint8]]  # (prompt, column) -> (T, H, W, 3)


def run(request: Request, console: Console) -> Report:
    """Run the comparison and write its files to ``request.out``, even if it is stopped or a mechanism fails.

    Returns: the report; its status is "failed" if a mechanism failed.
    Raises:
        BadInput: the pipeline does not support the options; nothing was drawn.
        KeyboardInterrupt: stopped (SIGINT, SIGTERM); finished pictures are saved.
    """
    console.print(f"Loading {_source(request)} …", highlight=False, soft_wrap=True)
    comparison = _prepare(request)
    report = comparison.report
    for name in ("compare.png", "compare.mp4"):
        (request.out / name).unlink(missing_ok=True)  # files of an earlier run do not match the new report
    report.save()
    try:
        with progress_bar(console) as progress:
            _draw_all(comparison, progress)
        report.status = "failed" if any(variant.status == "failed" for variant in report.variants) else "complete"
    except KeyboardInterrupt:
        report.status = "interrupted"
        raise
    except BaseException:
        report.status = "failed"
        raise
    finally:
        with ignore_interrupts():
            _finish(comparison, console)
    return report


def _source(request: Request) -> str:
    return request.pipeline or str((VIDEO if request.video else IMAGE).folder)


def _prepare(request: Request) -> Comparison:
    """Load the pipeline and check all options before the first picture is drawn."""
    pipe = load_pipeline(_source(request), request.dtype, request.device)
    name = type(pipe).__name__
    try:
        own = default_call(pipe, _source(request))
        size = _size(request, pipe, own.size)
        students = make_students(request.attention, pipe, token_grid(pipe, size))
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise BadInput(str(error)) from error
    steps = request.steps or own.steps
    if steps is None:
        raise BadInput(f"{name} has no default number of steps; give --steps")
    call = own.arguments
    call |= {"height": size.height, "width": size.width}
    if size.frames is not None:
        call["num_frames"] = size.frames
    prompts = list(request.prompts or prompts_of(_source(request)))
    variants = [Variant("dense", logit_fraction=1.0, short="softmax over all keys"), *map(_variant, students)]
    report = Report(request.out / "report.json", _about(request, pipe, size, steps, call), prompts, variants)
    return Comparison(request, pipe, size, steps, call, [None, *students], report, {})


def _size(request: Request, pipe: Any, own: Size) -> Size:
    """Requested size, else the pipeline's default; checked."""
    name = type(pipe).__name__
    if request.frames is not None and "num_frames" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(f"--frames is for clips, and {name} draws pictures")
    size = Size(request.height or own.height, request.width or own.width, request.frames or own.frames)
    if not size.height or not size.width:
        raise ValueError(f"{name} has no default size; give --height and --width")
    check_size(pipe, size)
    return size


def _variant(student: Student) -> Variant:
    options = {key: _for_json(value) for key, value in asdict(student.processor).items()}
    return Variant(student.label, options=options, short=student.short, source=student.source)


def _for_json(value: Any) -> Any:
    """Value for JSON, which has no infinity: an unbounded radius is written as on the command line."""
    if isinstance(value, tuple):
        return [_for_json(item) for item in value]
    return "inf" if value == math.inf else value


def _about(request: Request, pipe: Any, size: Size, steps: int, call: dict[str, Any]) -> dict[str, Any]:
    grid = token_grid(pipe, size)
    models = {name: type(model).__name__ for name, model in denoisers(pipe).items()}
    return {
        "command": list(request.command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": about_versions(),
        "machine": about_machine(request.device, request.dtype),
        "pipeline": {"source": _source(request), "class": type(pipe).__name__, "denoisers": models},
        "settings": {"steps": steps, "seed": request.seed, "call": call, "grid": list(grid) if grid else None},
        "timing": _TIMING,
        "lpips": "measured" if lpips_weights() else "not measured: torchvision or AlexNet's weights are missing",
    }


def _draw_all(comparison: Comparison, progress: Progress) -> None:
    """Draw dense, then each mechanism; if a mechanism fails, the others still run."""
    report = comparison.report
    overall = progress.add_task("pictures", total=len(report.variants) * len(report.prompts))
    for column, (variant, student) in enumerate(zip(report.variants, comparison.students, strict=True)):
        variant.status = "running"
        try:
            with student.installed(comparison.pipe) if student is not None else nullcontext():
                _draw_variant(comparison, column, progress, overall)
        except Exception as error:
            variant.status, variant.error = "failed", f"{type(error).__name__}: {error}"
            if student is None:  # no comparison without the baseline
                if isinstance(error, (ValueError, TypeError)):
                    raise BadInput(f"{type(comparison.pipe).__name__} rejects these arguments: {error}") from error
                raise
            progress.console.print(f"[red]{variant.label} failed[/red]: {variant.error}", highlight=False)
        else:
            variant.status = "complete"
        progress.update(overall, completed=(column + 1) * len(report.prompts))
        report.save()
    report.dense_again = _time_dense_again(comparison)
    drift = report.drift()
    if drift is not None and not 1 / _MAX_DRIFT < drift < _MAX_DRIFT:
        progress.console.print(
            f"[yellow]the time of dense at the end is {drift:.2f}× its time at the beginning: the machine had other "
            "load, so the times above are not comparable; run again on an idle machine[/yellow]", soft_wrap=True,
        )  # fmt: skip


def _time_dense_again(comparison: Comparison) -> float:
    steps = min(comparison.steps, 3)
    with StepTimer(denoisers(comparison.pipe).values(), comparison.request.device) as timer:
        _call(comparison, 0, steps=steps, output_type="latent")
    return timer.seconds_per_step(steps)


def _draw_variant(comparison: Comparison, column: int, progress: Progress, overall: Any) -> None:
    report, pipe = comparison.report, comparison.pipe
    variant, student = report.variants[column], comparison.students[column]
    step = progress.add_task(f"  {variant.label}, steps", total=comparison.steps)
    try:
        _call(comparison, 0, steps=1, output_type="latent")  # untimed warm-up of plans, buffers and kernels
        for prompt in range(len(report.prompts)):
            progress.reset(step)
            with StepTimer(denoisers(pipe).values(), comparison.request.device) as timer:
                output = _call(comparison, prompt, steps=comparison.steps, output_type="np", step=(progress, step))
            frames = to_frames(output)
            if student is not None:
                variant.logit_fraction = average_logit_fraction(pipe, comparison.steps)
                variant.installed = describe(pipe)
            picture = _measure(comparison, column, prompt, frames, timer.seconds_per_step(comparison.steps))
            variant.pictures.append(picture)
            report.save()
            progress.advance(overall)
            time = figure("seconds_per_step", picture.seconds_per_step)
            progress.console.print(
                f"{variant.label:8} {time:>6} s/step  {report.prompts[prompt]}", highlight=False, soft_wrap=True
            )
    finally:
        progress.remove_task(step)


def _call(comparison: Comparison, prompt: int, *, steps: int, output_type: str, step: Any = None) -> Any:
    """Call the pipeline, always with the same seed."""
    pipe, request = comparison.pipe, comparison.request
    extra: dict[str, Any] = {}
    if step is not None and "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:

        def advance(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress, task = step
            progress.advance(task)
            return tensors

        extra["callback_on_step_end"] = advance
    generator = torch.Generator("cpu").manual_seed(request.seed)
    return pipe(
        prompt=comparison.report.prompts[prompt], num_inference_steps=steps, generator=generator,
        output_type=output_type, **comparison.call, **extra,
    )  # fmt: skip


def _measure(comparison: Comparison, column: int, prompt: int, frames: NDArray[np.uint8], seconds: float) -> Picture:
    """Save a finished picture. Returns: its entry in the report, with figures."""
    report = comparison.report
    variant = report.variants[column]
    folder = comparison.request.out / "pictures"
    folder.mkdir(exist_ok=True)
    file = folder / f"{prompt + 1}-{variant.label}.{'png' if len(frames) == 1 else 'mp4'}"
    if len(frames) == 1:
        save_image(file, contact_cell(frames))
    else:
        save_clip(file, iter(frames), _FPS)
    comparison.drawn[prompt, column] = frames
    picture = Picture(prompt, str(file.relative_to(comparison.request.out)), seconds)
    baseline = report.variants[0].picture(prompt)
    if column and baseline is not None:
        picture.times_dense = baseline.seconds_per_step / seconds
        likeness = compare_frames(frames, comparison.drawn[prompt, 0])
        picture.psnr, picture.ssim, picture.lpips = likeness["psnr"], likeness["ssim"], likeness["lpips"]
    return picture


def _finish(comparison: Comparison, console: Console) -> None:
    """Save sheet, clip and report of the finished pictures, and print the table."""
    report, out = comparison.report, comparison.request.out
    for variant in report.variants:
        if variant.status == "running":
            variant.status = "interrupted" if report.status == "interrupted" else "failed"
    if comparison.drawn:
        _save_sheets(comparison)
    report.save()
    console.print(report.table())
    for name, file in {**report.files, "report": report.path.name}.items():
        console.print(f"{name:8} {out / file}", highlight=False, soft_wrap=True)


def _save_sheets(comparison: Comparison) -> None:
    report, out = comparison.report, comparison.request.out
    machine = report.about["machine"]
    subtitle = (
        f"{comparison.size} · {comparison.steps} steps · seed {comparison.request.seed} · {machine['dtype']} on "
        f"{machine['device_name']}" + (f", {machine['threads']} threads" if machine["device"] == "cpu" else "")
    )
    some = next(iter(comparison.drawn.values()))
    cells = {place: contact_cell(frames) for place, frames in comparison.drawn.items()}
    sheet = Sheet(report, cells[next(iter(cells))].height / cells[next(iter(cells))].width, subtitle)
    for (prompt, column), cell in cells.items():
        sheet.paste(prompt, column, cell)
    save_image(out / "compare.png", sheet.image)
    report.files["picture"] = "compare.png"
    if len(some) > 1:
        moving = Sheet(report, some.shape[1] / some.shape[2], subtitle)

        def frame_of(prompt: int, column: int, time: int) -> NDArray[np.uint8] | None:
            frames = comparison.drawn.get((prompt, column))
            return None if frames is None else frames[time]

        save_clip(out / "compare.mp4", sheet_frames(moving, len(some), frame_of), _FPS)
        report.files["clip"] = "compare.mp4"
