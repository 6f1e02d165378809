"""What a student has lost against its teacher, on samples that it was not trained on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..command import BadInput
from ..compare.metrics import compare_frames
from ..describe import logit_fraction
from ..files import replacing, write_json
from ..install import installed_layers
from ..load import load_attention
from ..loading import load_pipeline
from ..machine import about_machine, about_versions
from .buckets import find_buckets
from .lora import load_lora
from .noise import NoiseProcess, noise_process
from .objective import attention_outputs
from .prepare import make_samples, only_denoiser, progress_bar
from .request import Source
from .samples import Sample

__all__ = ["evaluate"]

FIGURES = (
    "flow_loss: mean squared error of the prediction (of noise - clean, noise or v, as the model was trained), one "
    "noise for both. prediction_error: squared distance of the student's prediction to the teacher's over the square "
    "of the teacher's. attention_error: the same of each attention module's output, each in its own model's forward. "
    "All are means over samples; by_level at each noise level (of flow matching sigma, else timestep over their "
    "number). psnr, ssim, lpips: of the student's picture against the teacher's, same prompt and seed, 8 bits."
)


@dataclass
class _Sums:
    """Added up over samples: by level the two losses and the error, by layer the error."""

    teacher: NDArray[np.float64]
    student: NDArray[np.float64]
    error: NDArray[np.float64]
    layers: dict[str, float] = field(default_factory=dict)
    count: int = 0


def evaluate(source: Source, attention: str, levels: int, pictures: int, console: Console) -> int:
    """Measure, and write ``evaluate.json``, ``evaluate.png`` and pictures side by side into ``source.out``.

    Args:
        source: the teacher, and samples that were not trained on.
        attention: what ``load_attention`` takes: a folder of ``convert``, a file, a hub id.
        levels: noise levels, evenly from clean to noise.
        pictures: so many of the prompts are drawn by both.
    Returns: exit status 0.
    Raises: BadInput: something that cannot be done.
    """
    accelerator = Accelerator(cpu=source.device == "cpu")
    pipe = load_pipeline(source.pipeline, torch.float32, accelerator.device)
    try:
        buckets = find_buckets(source, pipe)
        call = buckets[0].call
        process = noise_process(pipe.scheduler)
        _, model = only_denoiser(pipe)
        samples = make_samples(source, accelerator, pipe, model, buckets, console)
        prompts = source.prompts[:pictures]
        drawn = [_draw(pipe, call, prompt, source.seed + i) for i, prompt in enumerate(prompts)]
        teacher = copy.deepcopy(model).eval()
        load_attention(pipe, attention)
        load_lora(model, Path(attention))
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise BadInput(str(error)) from error
    model.eval()
    sums = _Sums(np.zeros(levels), np.zeros(levels), np.zeros(levels))
    with progress_bar(console, accelerator) as progress:
        task = progress.add_task("measuring", total=len(samples), told="")
        for i, sample in enumerate(samples):
            _measure(sums, sample, teacher, model, process, source.seed + i, accelerator.device)
            progress.advance(task)
    report = _report(sums)
    report["pictures"] = [
        _compare(source.out / f"picture-{i}.png", prompt, drawn[i], _draw(pipe, call, prompt, source.seed + i))
        for i, prompt in enumerate(prompts)
    ]
    about = {
        "pipeline": source.pipeline, "attention": attention, "samples": len(samples),
        "data": None if source.data is None else str(source.data), "seed": source.seed, "call": call,
        "sizes": [str(bucket.size) for bucket in buckets],
        "mechanisms": sorted({layer.mechanism.name for layer in installed_layers(model).values()}),
        "logit_fraction": logit_fraction(pipe), "machine": about_machine(accelerator.device, torch.float32),
        "versions": about_versions(), "figures": FIGURES,
    }  # fmt: skip
    write_json(source.out / "evaluate.json", {**about, **report})
    _plot(report, source.out / "evaluate.png")
    _show(report, console)
    return 0


def _draw(pipe: Any, call: dict[str, Any], prompt: str, seed: int) -> NDArray[np.uint8]:
    """(T, H, W, 3)."""
    with torch.no_grad():
        drawn = pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **call)[0][0]
    frames = drawn[None] if drawn.ndim == 3 else drawn
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


@torch.no_grad()
def _measure(
    sums: _Sums, sample: Sample, teacher: nn.Module, student: nn.Module, process: NoiseProcess, seed: int,
    device: torch.device,
) -> None:  # fmt: skip
    """One sample at every level, with one noise."""
    noise = torch.randn(sample.latents.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    latents = sample.latents.to(device)
    sample.conditions.tensors = {key: x.to(device) for key, x in sample.conditions.tensors.items()}
    layers = list(installed_layers(student))
    n = len(sums.error)
    for i in range(n):
        level = torch.tensor([(i + 0.5) / n], device=device)
        noisy, target = process.mix(latents, noise, level)
        arguments = sample.conditions.arguments(noisy, process.timestep(level))
        with attention_outputs(teacher, layers) as theirs:
            wanted = teacher(**arguments)[0].float()
        with attention_outputs(student, layers) as ours:
            found = student(**arguments)[0].float()
        sums.teacher[i] += float(F.mse_loss(wanted, target))
        sums.student[i] += float(F.mse_loss(found, target))
        sums.error[i] += _distance(found, wanted)
        for name in layers:
            sums.layers[name] = sums.layers.get(name, 0.0) + _distance(ours[name], theirs[name]) / n
    sums.count += 1


def _distance(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30))


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
    return {"prompt": prompt, "file": path.name, **compare_frames(student, teacher)}


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


def _figure(value: float | None) -> str:
    return "equal" if value is None else f"{value:.3g}"
