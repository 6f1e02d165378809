"""Evaluation of a student against its teacher, on held-out samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from ..common.choices import MixedPrecision, check_choice, check_count
from ..common.environment import about_machine, about_versions
from ..common.errors import BadInput, as_bad_input
from ..common.files import remove_leftovers, replacing, write_json
from ..common.pipeline_loading import load_pipeline
from ..common.progress import progress_bar
from ..comparison.metrics import clip_score, compare_frames
from ..install.describe import logit_fraction
from ..install.installation import installed_layers, reset_attn_processor, set_by_layer
from ..mechanisms.attn_spec import AttentionSpec
from ..weights.load import load_attention
from .data.buckets import find_buckets, processors_for
from .data.prepare import make_samples, only_denoiser
from .data.samples import Sample
from .recipes.capture import merge
from .recipes.noise import NoiseProcess, noise_process
from .recipes.objective import attention_outputs
from .request import Source

__all__ = ["Evaluation", "PromptCheck", "evaluate"]

PromptCheck = Callable[
    [Any, dict[str, Any], int, Callable[[int], None]], list[bool]
]  # see demo.evaluate_captions.prompt_check

FIGURES = (
    "flow_loss: mean squared error of the prediction (noise - clean, noise or v, as the model was trained), with the "
    "same noise for teacher and student. prediction_error: squared distance between student's and teacher's "
    "prediction, divided by the teacher's squared norm. attention_error: the same for the output of each attention "
    "module, each in its own model's forward pass. All are means over samples; by_level: per noise level (sigma for "
    "flow matching, else timestep divided by the number of timesteps). psnr, ssim, lpips: student's picture against "
    "teacher's, same prompt and seed, 8 bits. clip_score: 100 times the cosine between prompt and picture, for teacher "
    "and student. prompt_check: shares of held-out captions drawn correctly, same captions and seeds; both: by both "
    "models; points: student minus teacher, in percentage points."
)


@dataclass
class _Sums:
    """Sums over samples: losses and prediction error per noise level, attention error per layer."""

    teacher: NDArray[np.float64]
    student: NDArray[np.float64]
    error: NDArray[np.float64]
    layers: dict[str, float] = field(default_factory=dict)
    count: int = 0


class Evaluation:
    """A teacher with its samples, pictures and caption results, computed once for any number of students."""

    def __init__(
        self, source: Source, console: Console, *, levels: int = 8, pictures: int = 2, check: PromptCheck | None = None,
        captions: int = 0, mixed_precision: MixedPrecision = "no", batch: int = 1,
    ) -> None:  # fmt: skip
        """Arguments as in :func:`evaluate`.

        Raises: TypeError: a value of the wrong type. BadInput: the request cannot be carried out.
        """
        with as_bad_input():
            check_count("--levels", levels)
            check_count("--batch", batch)
            check_count("--pictures", pictures, 0)
            check_count("--captions", captions, 0)
            check_choice("--mixed-precision", mixed_precision, MixedPrecision)
        self.source, self.levels, self.console, self.check = source, levels, console, check
        self.batch = batch
        remove_leftovers(source.out)
        self.accelerator = Accelerator(cpu=source.device == "cpu", mixed_precision=mixed_precision)
        self.pipe = load_pipeline(source.pipeline, torch.float32, self.accelerator.device)
        try:
            self.buckets = find_buckets(source, self.pipe)
            self.call = self.buckets[0].call
            self.process = noise_process(self.pipe.scheduler)
            _, self.model = only_denoiser(self.pipe)
            self.samples = make_samples(source, self.accelerator, self.pipe, self.model, self.buckets, console)
        except (ValueError, TypeError) as error:
            raise BadInput(str(error)) from error
        self.prompts = source.prompts[:pictures]
        self.drawn = [self._draw(i) for i in range(len(self.prompts))]
        self.right = self._check_captions("teacher", captions)
        self.teacher = copy.deepcopy(self.model).eval()

    def measure(self, student: str | AttentionSpec, out: Path, captions: int | None = None) -> dict[str, Any]:
        """Measure a student and write pictures of teacher and student side by side into ``out``.

        The pipeline is reset to the teacher afterwards.

        Args:
            student: an argument of ``load_attention``, or attention without training.
            captions: number of the teacher's captions that the student draws; default all.
        Returns: the report.
        Raises: BadInput: the student does not exist, or does not fit the pipeline.
        """
        out.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(student, str):
                load_attention(self.pipe, student)
            else:
                set_by_layer(self.pipe, processors_for(student, self.buckets, self.console.print))
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise BadInput(str(error)) from error
        try:
            self.model.eval()
            sums = _Sums(np.zeros(self.levels), np.zeros(self.levels), np.zeros(self.levels))
            with self._progress() as progress:
                task = progress.add_task("measuring", total=len(self.samples))
                for i, sample in enumerate(self.samples):
                    seed, device = self.source.seed + i, self.accelerator.device
                    with self.accelerator.autocast():
                        _measure(sums, sample, self.teacher, self.model, self.process, seed, self.batch, device)
                    progress.advance(task)
            report = {"attention": student if isinstance(student, str) else None, **_report(sums)}
            report["pictures"] = [
                _compare(out / f"picture-{i}.png", prompt, self.drawn[i], self._draw(i))
                for i, prompt in enumerate(self.prompts)
            ]
            if self.right is not None:
                right = self.right[:captions]
                report["prompt_check"] = _agreement(right, self._check_captions("student", len(right)) or [])
            layers = installed_layers(self.model)
            report["mechanisms"] = sorted({str(layer.mechanism) for layer in layers.values()})
            report["converted_layers"] = list(layers)
            report["logit_fraction"] = logit_fraction(self.pipe)
        finally:
            reset_attn_processor(self.pipe)
        return report

    def about(self) -> dict[str, Any]:
        """The settings and versions of the measurement, for the report."""
        source = self.source
        return {
            "pipeline": source.pipeline, "samples": len(self.samples),
            "data": None if source.data is None else str(source.data), "seed": source.seed, "call": self.call,
            "sizes": [str(bucket.size) for bucket in self.buckets],
            "mixed_precision": self.accelerator.mixed_precision,
            "machine": about_machine(self.accelerator.device, torch.float32), "versions": about_versions(),
            "figures": FIGURES,
        }  # fmt: skip

    def _progress(self) -> Progress:
        return progress_bar(self.console, disable=not self.accelerator.is_main_process)

    def _draw(self, i: int) -> NDArray[np.uint8]:
        """Draw the i-th prompt: (T, H, W, 3) uint8."""
        generator = torch.Generator().manual_seed(self.source.seed + i)
        with torch.no_grad(), self.accelerator.autocast():
            drawn = self.pipe(prompt=self.prompts[i], generator=generator, output_type="np", **self.call)[0][0]
        frames = drawn[None] if drawn.ndim == 3 else drawn
        return (frames.clip(0, 1) * 255).round().astype(np.uint8)

    def _check_captions(self, model: str, captions: int) -> list[bool] | None:
        """Whether each of the first ``captions`` held-out captions is drawn correctly; None without a check."""
        if self.check is None or not captions:
            return None
        with self._progress() as progress, self.accelerator.autocast():
            task = progress.add_task(f"{model}'s captions", total=captions)
            return self.check(self.pipe, self.call, captions, lambda n: progress.advance(task, n))


def evaluate(
    source: Source, student: str | AttentionSpec, console: Console, *, levels: int = 8, pictures: int = 2,
    check: PromptCheck | None = None, captions: int = 0, mixed_precision: MixedPrecision = "no", batch: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Measure a student; write ``evaluate.json``, ``evaluate.png`` and side-by-side pictures into ``source.out``.

    Args:
        source: the teacher and the held-out samples.
        student: an argument of ``load_attention`` (a folder of ``convert``, a file, a hub id), or attention without
            training.
        levels: number of noise levels, evenly spaced between clean and noise.
        pictures: number of prompts that teacher and student draw.
        check: whether a pipeline draws each of the first n held-out captions correctly; only for the vocabulary of
            the embedded pipelines.
        captions: number of captions that teacher and student draw.
        mixed_precision: "no", "fp16" or "bf16", for teacher and student.
        batch: noise levels per forward pass.
    Returns: the content of ``evaluate.json``.
    Raises: TypeError: a value of the wrong type. BadInput: the request cannot be carried out.
    """
    evaluation = Evaluation(
        source, console, levels=levels, pictures=pictures, check=check, captions=captions,
        mixed_precision=mixed_precision, batch=batch,
    )  # fmt: skip
    report = {**evaluation.about(), **evaluation.measure(student, source.out)}
    write_json(source.out / "evaluate.json", report)
    _plot(report, source.out / "evaluate.png")
    _show(report, console)
    return report


def _agreement(teacher: list[bool], student: list[bool]) -> dict[str, Any]:
    """Shares of the captions that teacher, student and both draw correctly."""
    both = sum(a and b for a, b in zip(teacher, student, strict=True))
    n = len(teacher)
    return {
        "captions": n, "teacher": sum(teacher) / n, "student": sum(student) / n, "both": both / n,
        "points": 100 * (sum(student) - sum(teacher)) / n,
    }  # fmt: skip


@torch.no_grad()
def _measure(
    sums: _Sums, sample: Sample, teacher: nn.Module, student: nn.Module, process: NoiseProcess, seed: int, batch: int,
    device: torch.device,
) -> None:  # fmt: skip
    """Add one sample's figures at every noise level, with the same noise; ``batch`` levels per forward pass."""
    noise = torch.randn(sample.latents.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    latents = sample.latents.to(device)
    sample.conditions.tensors = {key: x.to(device) for key, x in sample.conditions.tensors.items()}
    layers = list(installed_layers(student))
    n = len(sums.error)
    for first in range(0, n, batch):
        level = (torch.arange(first, min(first + batch, n), device=device) + 0.5) / n
        noisy, target = process.mix(latents, noise, level)
        arguments = merge([sample.conditions] * len(level)).arguments(noisy, process.timestep(level))
        with attention_outputs(teacher, layers) as theirs:
            wanted = teacher(**arguments)[0].float()
        with attention_outputs(student, layers) as ours:
            found = student(**arguments)[0].float()
        losses = [(x - target).square().flatten(1).mean(1).double() for x in (wanted, found)]
        errors = [_distance(found, wanted), *(_distance(ours[name], theirs[name]) for name in layers)]
        figures = torch.stack([*losses, *errors]).cpu().numpy()  # one synchronization
        here = slice(first, first + len(level))
        sums.teacher[here] += figures[0]
        sums.student[here] += figures[1]
        sums.error[here] += figures[2]
        for name, each in zip(layers, figures[3:], strict=True):
            sums.layers[name] = sums.layers.get(name, 0.0) + float(each.sum()) / n
    sums.count += 1


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Relative squared distance ``‖found - wanted‖² / ‖wanted‖²`` of each batch element; (B,) float64."""
    found, wanted = found.double().flatten(1), wanted.double().flatten(1)
    return (found - wanted).square().sum(1) / wanted.square().sum(1).clamp(min=1e-30)


def _report(sums: _Sums) -> dict[str, Any]:
    """Means over samples, in the structure of ``evaluate.json``."""
    teacher, student, error = (x / sums.count for x in (sums.teacher, sums.student, sums.error))
    n = len(error)
    return {
        "flow_loss": {
            "teacher": float(teacher.mean()), "student": float(student.mean()),
            "student_over_teacher": float(student.mean() / teacher.mean()),
        },
        "prediction_error": float(error.mean()),
        "by_level": [
            {
                "level": (i + 0.5) / n, "teacher": float(teacher[i]), "student": float(student[i]),
                "prediction_error": float(error[i]),
            }
            for i in range(n)
        ],
        "attention_error": {name: total / sums.count for name, total in sums.layers.items()},
    }  # fmt: skip


def _compare(path: Path, prompt: str, teacher: NDArray[np.uint8], student: NDArray[np.uint8]) -> dict[str, Any]:
    """Write both pictures, teacher on the left, and return their similarity; for a clip its middle frame is shown."""
    middle = len(teacher) // 2
    with replacing(path) as temporary:
        Image.fromarray(np.concatenate([teacher[middle], student[middle]], 1)).save(temporary)
    scores = {"teacher": clip_score(teacher, prompt), "student": clip_score(student, prompt)}
    return {"prompt": prompt, "file": path.name, **compare_frames(student, teacher), "clip_score": scores}


def _plot(report: dict[str, Any], path: Path) -> None:
    """Plot losses by noise level and errors by layer; does nothing if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = [row["level"] for row in report["by_level"]]
    for name, style in (("teacher", "o-"), ("student", "s--")):
        left.plot(at, [row[name] for row in report["by_level"]], style, label=name, markersize=4)
    left.set(xlabel="noise level", ylabel="loss", title="objective")
    left.legend()
    errors = list(report["attention_error"].values())
    right.bar(range(len(errors)), errors, color="#2a6fbb")
    right.set(xlabel="layer", ylabel="relative squared error", title="attention output")
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": None})


def _show(report: dict[str, Any], console: Console) -> None:
    """Print the report as a table."""
    flow, errors = report["flow_loss"], list(report["attention_error"].values())
    rows: Sequence[tuple[str, str]] = [
        ("flow loss, teacher", f"{flow['teacher']:.5f}"),
        ("flow loss, student", f"{flow['student']:.5f} ({100 * (flow['student_over_teacher'] - 1):+.2f} %)"),
        ("prediction error", f"{report['prediction_error']:.2e}"),
        *_prompt_row(report.get("prompt_check")),
        ("attention error, mean and maximum over layers", f"{np.mean(errors):.2e}, {max(errors):.2e}"),
        *(
            (f"PSNR, SSIM: {row['prompt'][:50]}", f"{_figure(row['psnr'])} dB, {_figure(row['ssim'])}")
            for row in report["pictures"]
        ),
    ]
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _prompt_row(check: dict[str, Any] | None) -> Sequence[tuple[str, str]]:
    if check is None:
        return ()
    shares = f"{check['teacher']:.1%}, {check['student']:.1%} ({check['points']:+.1f} points)"
    return ((f"correctly drawn captions of {check['captions']:,}, teacher, student", shares),)


def _figure(value: float | None) -> str:
    return "equal" if value is None else f"{value:.3g}"
