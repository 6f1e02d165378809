"""What a student has lost against its teacher, on samples that it was not trained on."""

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
from rich.table import Table
from torch import Tensor, nn

from ..attn_spec import AttentionSpec
from ..compare.metrics import clip_score, compare_frames
from ..describe import logit_fraction
from ..environment import about_machine, about_versions
from ..errors import BadInput
from ..files import remove_leftovers, replacing, write_json
from ..install import installed_layers, reset_attn_processor, set_by_layer
from ..load import load_attention
from ..pipeline_loading import load_pipeline
from .buckets import find_buckets, processors_for
from .capture import merge
from .noise import NoiseProcess, noise_process
from .objective import attention_outputs
from .prepare import make_samples, only_denoiser, progress_bar
from .request import Source
from .samples import Sample

__all__ = ["Evaluation", "PromptCheck", "evaluate"]

PromptCheck = Callable[
    [Any, dict[str, Any], int, Callable[[int], None]], list[bool]
]  # see demo.evaluate_captions.prompt_check

FIGURES = (
    "flow_loss: mean squared error of the prediction (of noise - clean, noise or v, as the model was trained), one "
    "noise for both. prediction_error: squared distance of the student's prediction to the teacher's over the square "
    "of the teacher's. attention_error: the same of each attention module's output, each in its own model's forward. "
    "All are means over samples; by_level at each noise level (of flow matching sigma, else timestep over their "
    "number). psnr, ssim, lpips: of the student's picture against the teacher's, same prompt and seed, 8 bits. "
    "clip_score: 100 times the cosine of prompt and picture, teacher's and student's. prompt_check: shares of held-out "
    "captions that are drawn right, same captions and seeds; both: by both; points: student's less teacher's, in per "
    "cent."
)


@dataclass
class _Sums:
    """Added up over samples: by level the two losses and the error, by layer the error."""

    teacher: NDArray[np.float64]
    student: NDArray[np.float64]
    error: NDArray[np.float64]
    layers: dict[str, float] = field(default_factory=dict)
    count: int = 0


class Evaluation:
    """A teacher's side, made once: samples, its pictures, and which captions it draws right."""

    def __init__(
        self, source: Source, levels: int, pictures: int, console: Console, check: PromptCheck | None = None,
        captions: int = 0, mixed_precision: str = "no", batch: int = 1,
    ) -> None:  # fmt: skip
        """Arguments as of :func:`evaluate`. Raises: BadInput: something that cannot be done."""
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
        self.right = self._checked("teacher", captions)
        self.teacher = copy.deepcopy(self.model).eval()

    def measure(self, student: str | AttentionSpec, out: Path, captions: int | None = None) -> dict[str, Any]:
        """What a student has lost; its pictures beside the teacher's go into ``out``. The pipeline is then the teacher
        again.

        Args:
            student: what ``load_attention`` takes, or attention that was not trained.
            captions: so many of the captions that the teacher has drawn; default all.
        Raises: BadInput: it is not there, or does not fit.
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
            with progress_bar(self.console, self.accelerator) as progress:
                task = progress.add_task("measuring", total=len(self.samples), told="")
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
                report["prompt_check"] = _agreement(right, self._checked("student", len(right)) or [])
            layers = installed_layers(self.model)
            report["mechanisms"] = sorted({str(layer.mechanism) for layer in layers.values()})
            report["converted_layers"] = list(layers)
            report["logit_fraction"] = logit_fraction(self.pipe)
        finally:
            reset_attn_processor(self.pipe)
        return report

    def about(self) -> dict[str, Any]:
        """On what it was measured."""
        source = self.source
        return {
            "pipeline": source.pipeline, "samples": len(self.samples),
            "data": None if source.data is None else str(source.data), "seed": source.seed, "call": self.call,
            "sizes": [str(bucket.size) for bucket in self.buckets],
            "mixed_precision": self.accelerator.mixed_precision,
            "machine": about_machine(self.accelerator.device, torch.float32), "versions": about_versions(),
            "figures": FIGURES,
        }  # fmt: skip

    def _draw(self, i: int) -> NDArray[np.uint8]:
        """(T, H, W, 3), of the i-th prompt."""
        generator = torch.Generator().manual_seed(self.source.seed + i)
        with torch.no_grad(), self.accelerator.autocast():
            drawn = self.pipe(prompt=self.prompts[i], generator=generator, output_type="np", **self.call)[0][0]
        frames = drawn[None] if drawn.ndim == 3 else drawn
        return (frames.clip(0, 1) * 255).round().astype(np.uint8)

    def _checked(self, who: str, captions: int) -> list[bool] | None:
        if self.check is None or not captions:
            return None
        with progress_bar(self.console, self.accelerator) as progress, self.accelerator.autocast():
            task = progress.add_task(f"{who}'s captions", total=captions, told="")
            return self.check(self.pipe, self.call, captions, lambda n: progress.advance(task, n))


def evaluate(
    source: Source, student: str | AttentionSpec, levels: int, pictures: int, console: Console,
    check: PromptCheck | None = None, captions: int = 0, mixed_precision: str = "no", batch: int = 1,
) -> int:  # fmt: skip
    """Measure, and write ``evaluate.json``, ``evaluate.png`` and pictures side by side into ``source.out``.

    Args:
        source: the teacher, and samples that were not trained on.
        student: what ``load_attention`` takes (a folder of ``convert``, a file, a hub id), or attention not trained.
        levels: noise levels, evenly from clean to noise.
        pictures: so many of the prompts are drawn by both.
        check: which of so many captions a pipeline draws right; of the language of the embedded ones.
        captions: how many are drawn by both.
        mixed_precision: of both: "no", "fp16" or "bf16".
        batch: levels at a time.
    Returns: exit status 0.
    Raises: BadInput: something that cannot be done.
    """
    evaluation = Evaluation(source, levels, pictures, console, check, captions, mixed_precision, batch)
    report = evaluation.measure(student, source.out)
    write_json(source.out / "evaluate.json", {**evaluation.about(), **report})
    _plot(report, source.out / "evaluate.png")
    _show(report, console)
    return 0


def _agreement(teacher: list[bool], student: list[bool]) -> dict[str, Any]:
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
    """One sample at every level, with one noise; so many levels at a time."""
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
        figures = torch.stack([*losses, *errors]).cpu().numpy()  # one wait for the GPU
        here = slice(first, first + len(level))
        sums.teacher[here] += figures[0]
        sums.student[here] += figures[1]
        sums.error[here] += figures[2]
        for name, each in zip(layers, figures[3:], strict=True):
            sums.layers[name] = sums.layers.get(name, 0.0) + float(each.sum()) / n
    sums.count += 1


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    """(B,) float64: of each element the squared distance over the square of the second."""
    found, wanted = found.double().flatten(1), wanted.double().flatten(1)
    return (found - wanted).square().sum(1) / wanted.square().sum(1).clamp(min=1e-30)


def _report(sums: _Sums) -> dict[str, Any]:
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
    """Writes both, the teacher's on the left, of a clip the frame in the middle."""
    middle = len(teacher) // 2
    with replacing(path) as temporary:
        Image.fromarray(np.concatenate([teacher[middle], student[middle]], 1)).save(temporary)
    scores = {"teacher": clip_score(teacher, prompt), "student": clip_score(student, prompt)}
    return {"prompt": prompt, "file": path.name, **compare_frames(student, teacher), "clip_score": scores}


def _plot(report: dict[str, Any], path: Path) -> None:
    """Losses by noise level, and errors by layer; left out where matplotlib is not installed."""
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
    right.set(xlabel="layer", ylabel="squared error over the teacher's square", title="attention output")
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": None})


def _show(report: dict[str, Any], console: Console) -> None:
    flow, errors = report["flow_loss"], list(report["attention_error"].values())
    rows: Sequence[tuple[str, str]] = [
        ("flow loss, teacher", f"{flow['teacher']:.5f}"),
        ("flow loss, student", f"{flow['student']:.5f} ({100 * (flow['student_over_teacher'] - 1):+.2f} %)"),
        ("prediction error", f"{report['prediction_error']:.2e}"),
        *_prompt_row(report.get("prompt_check")),
        ("attention error, mean and worst layer", f"{np.mean(errors):.2e}, {max(errors):.2e}"),
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
    return ((f"captions drawn right of {check['captions']:,}, teacher, student", shares),)


def _figure(value: float | None) -> str:
    return "equal" if value is None else f"{value:.3g}"
