"""The commands ``convert``, ``evaluate`` and ``compare`` as Python functions, with their options as keywords.

Training and comparison code is imported when a function is called, so that ``import dit_accel`` stays fast. Messages of
errors name the options as on the command line: ``lr_schedule`` is ``--lr-schedule``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common.choices import Dtype, LoraLayers, MixedPrecision, Recipe, Sampling, SaveDtype, Schedule, Train, check_count
from .common.errors import as_bad_input
from .mechanisms.processor import AcceleratedAttnProcessor
from .mechanisms.registry import PROCESSORS, untrained_mechanisms

if TYPE_CHECKING:
    import torch

    from .comparison.report import Report
    from .conversion.evaluate import PromptCheck
    from .mechanisms.attn_spec import AttentionSpec

__all__ = ["compare", "convert", "evaluate"]

StrPath = str | os.PathLike[str]
Attention = StrPath | AcceleratedAttnProcessor  # an argument of --attn, or a processor


def convert(
    attn: Attention,
    out: StrPath,
    *,
    pipeline: StrPath | None = None,
    video: bool = False,
    recipe: Recipe | None = None,
    train: Train | None = None,
    rank: int = 16,
    lora_layers: LoraLayers = "attention",
    convert_layers: int | None = None,
    data: StrPath | None = None,
    data_free: bool = False,
    prompts: StrPath | Sequence[str] | None = None,
    samples: int = 64,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    size: str | Sequence[str] | None = None,
    fps: float | None = None,
    steps: int = 1000,
    batch: int = 4,
    accumulate: int = 1,
    lr: float | None = None,
    warmup: int = 50,
    lr_schedule: Schedule = "constant",
    timestep_sampling: Sampling = "shift",
    caption_dropout: float = 0.0,
    loss_weight: Mapping[str, float] | Sequence[str] | None = None,
    mixed_precision: MixedPrecision | None = None,
    gradient_checkpointing: bool = False,
    cuda_graph: bool = False,
    seed: int = 0,
    save_every: int = 200,
    save_dtype: SaveDtype = "float32",
    sample_every: int = 0,
    report: int = 8,
    push_to_hub: str | None = None,
    tracker: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Path:
    """Fine-tune a pipeline to use a sub-quadratic mechanism; the command ``dit-accel convert``.

    If a run is interrupted, the same call resumes it from the last checkpoint. Under ``accelerate launch``, call it in
    every process.

    Args:
        attn: target attention: a processor, or text such as ``"sla:critical=0.1"``.
        out: output folder.
        pipeline: folder or hub id of the teacher; default: the embedded image pipeline, or with ``video`` the embedded
            video pipeline.
        recipe: losses and stages; default: "clear" for CLEAR, else "sla".
        train: trained parameters: "new" (those the mechanism adds), "attention", "lora" or "full"; default: the
            recipe's.
        rank, lora_layers: rank of LoRA, and whether it is added to the attention layers or to whole blocks.
        convert_layers: number of layers that the recipe "linvideo" converts.
        data: pictures or clips with captions: a folder, or shards of a webdataset.
        data_free: train on ``samples`` samples that the teacher generates from ``prompts`` (a file with one prompt per
            line, or the prompts). Give ``data`` or ``data_free``.
        height, width, frames: training size; default: the pipeline's.
        size: training sizes such as ``["512x768", "768x512"]``, instead of ``height``, ``width`` and ``frames``.
        fps: frames per second sampled from each clip of ``data``.
        steps, batch, accumulate: optimizer steps, samples per batch and process, batches per step.
        lr, warmup, lr_schedule: learning rate (default: the recipe's), warm-up steps, schedule after the warm-up.
        timestep_sampling: distribution of the noise levels in flow matching.
        caption_dropout: share of training samples with an empty caption.
        loss_weight: loss weights that replace the recipe's, such as ``{"flow": 0, "prediction": 1}``.
        mixed_precision: default: "bf16" on a GPU, else "no".
        gradient_checkpointing: recompute activations in the backward pass.
        cuda_graph: replay the forward and backward pass as a CUDA graph.
        seed: random seed.
        save_every, sample_every: steps between checkpoints, and between sample pictures (0: none).
        save_dtype: precision of the saved file.
        report: number of new teacher samples for the evaluation at the end; 0: none.
        push_to_hub: hub repository, ``owner/name``, for the result.
        tracker: accelerate's tracker for the losses, such as "tensorboard".
        device: "cpu"; default: the device that accelerate selects.
        quiet: print nothing.
    Returns: the output folder, an argument of :func:`dit_accel.load_attention`.
    Raises:
        TypeError, ValueError: an option of the wrong type or out of range, or that does not fit the pipeline; raised
            before any work.
        RuntimeError: the loss became NaN or infinite.
        OSError: a file cannot be written; the last checkpoint is kept.
    """
    from rich.console import Console

    from .common.files import require_writable
    from .conversion.card import check_hub
    from .conversion.finish import finish
    from .conversion.recipes.recipe import parse_weight
    from .conversion.request import Request, default_precision, make_source
    from .conversion.run import run

    with as_bad_input():
        spec = _spec(attn)
        check_count("--report", report, 0)
        source = make_source(
            out=Path(out), pipeline=_text(pipeline), video=video, data=_path(data), data_free=data_free,
            prompts=_prompts(prompts), samples=samples, height=height, width=width, frames=frames,
            size=_texts(size), fps=fps, seed=seed, device=device,
        )  # fmt: skip
        request = Request(
            source=source, attention=spec, recipe=recipe or PROCESSORS[spec.name].recipe, train=train,
            rank=rank, lora_layers=lora_layers, convert_layers=convert_layers, steps=steps, batch=batch,
            accumulate=accumulate, lr=lr, warmup=warmup, schedule=lr_schedule, sampling=timestep_sampling,
            caption_dropout=caption_dropout, weights=tuple(map(parse_weight, _weights(loss_weight))),
            mixed_precision=mixed_precision or default_precision(device),
            gradient_checkpointing=gradient_checkpointing, cuda_graph=cuda_graph, save_every=save_every,
            save_dtype=save_dtype, sample_every=sample_every, tracker=tracker,
        )  # fmt: skip
        if push_to_hub is not None:
            check_hub(push_to_hub)
        require_writable(request.source.out)
    console = Console(quiet=quiet)
    run(request, console)
    finish(request, report, push_to_hub, console)
    return request.source.out


def evaluate(
    attn: Attention,
    out: StrPath,
    *,
    pipeline: StrPath | None = None,
    video: bool = False,
    data: StrPath | None = None,
    data_free: bool = False,
    prompts: StrPath | Sequence[str] | None = None,
    samples: int = 16,
    levels: int = 8,
    batch: int = 1,
    pictures: int = 2,
    captions: int = 0,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    size: str | Sequence[str] | None = None,
    fps: float | None = None,
    mixed_precision: MixedPrecision | None = None,
    seed: int = 1_000_000,
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure the quality of converted attention against its teacher; the command ``dit-accel evaluate``.

    Args:
        attn: the student: an argument of :func:`dit_accel.load_attention`, or untrained attention as in
            :func:`convert`.
        out: output folder.
        pipeline, video, data, data_free, prompts, samples, height, width, frames, size, fps, device, quiet: as in
            :func:`convert`; give samples that the student was not trained on.
        levels: number of noise levels, evenly spaced from clean to noise.
        batch: noise levels per forward pass.
        pictures: number of prompts that both teacher and student draw.
        captions: number of held-out captions that both draw and a scene checker verifies; embedded pipelines only.
        mixed_precision: default: "bf16" on a GPU, else "no".
        seed: random seed; use another one than for the training.
    Returns: the content of ``evaluate.json``, with ``flow_loss``, ``prediction_error``, ``attention_error``,
        ``pictures`` and, under ``figures``, how they were measured.
    Raises: TypeError, ValueError: an option of the wrong type or out of range, or that does not fit the pipeline;
        raised before any work.
    """
    from rich.console import Console

    from .common.files import require_writable
    from .conversion.evaluate import evaluate as measure
    from .conversion.request import default_precision, make_source

    with as_bad_input():
        student = _student(attn)
        source = make_source(
            out=Path(out), pipeline=_text(pipeline), video=video, data=_path(data), data_free=data_free,
            prompts=_prompts(prompts), samples=samples, height=height, width=width, frames=frames, size=_texts(size),
            fps=fps, seed=seed, device=device,
        )  # fmt: skip
        check = _prompt_check(source.pipeline) if captions else None
        require_writable(source.out)
    return measure(
        source, student, Console(quiet=quiet), levels=levels, pictures=pictures, check=check, captions=captions,
        mixed_precision=mixed_precision or default_precision(device), batch=batch,
    )  # fmt: skip


def compare(
    attn: Attention | Sequence[Attention] | None = None,
    *,
    pipeline: StrPath | None = None,
    video: bool = False,
    prompt: str | Sequence[str] | None = None,
    steps: int | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype | torch.dtype | None = None,
    out: StrPath = "compare",
    quiet: bool = False,
    command: Sequence[str] = ("dit_accel.compare",),
) -> Report:
    """Generate the same prompts with dense attention and with each mechanism; the command ``dit-accel compare``.

    Args:
        attn: attention to compare with dense, one or several: processors, texts such as ``"gna:window=16x16"``, or
            arguments of :func:`dit_accel.load_attention`; default: SLA, CLEAR, LLSA and GNA, for an embedded pipeline
            its fine-tuned ones.
        pipeline: folder or hub id; default: the embedded image pipeline, or with ``video`` the embedded video
            pipeline.
        prompt: one prompt or several; default: example prompts.
        steps, height, width, frames: default: the pipeline's.
        seed: seed of every picture.
        device: default: CUDA, else MPS, else the CPU.
        dtype: default: bfloat16 on CUDA, else float32.
        out: output folder.
        quiet: print nothing.
        command: recorded in the report.
    Returns: the report, also in ``report.json``: ``status``, ``variants`` with the figures of each picture, ``path``;
        ``content()`` is the JSON data. If a mechanism fails, its variant has the error, and ``status`` is "failed".
    Raises: TypeError, ValueError: an option of the wrong type or out of range, or that does not fit the pipeline;
        raised before any picture is drawn.
    """
    from rich.console import Console

    from .common.bundled import select_embedded
    from .common.environment import pick_device, pick_dtype
    from .common.files import require_writable
    from .comparison.request import Request
    from .comparison.run import run

    with as_bad_input():
        embedded = select_embedded(_text(pipeline), video)
        names = untrained_mechanisms()
        defaults = embedded.students(names) if pipeline is None else names
        several = isinstance(attn, Sequence) and not isinstance(attn, str)
        given: Sequence[Any] = attn if several else () if attn is None else (attn,)  # type: ignore[assignment]
        target = pick_device(None if device is None else str(device))
        request = Request(
            attention=tuple(map(_student, given or defaults)), out=Path(out), device=target,
            dtype=pick_dtype(None if dtype is None else str(dtype), target), pipeline=_text(pipeline), video=video,
            prompts=_texts(prompt), steps=steps, seed=seed, height=height, width=width, frames=frames,
            command=tuple(command),
        )  # fmt: skip
        require_writable(request.out)
    return run(request, Console(quiet=quiet))


def _spec(attn: Attention) -> AttentionSpec:
    """Parsed attention; of a processor, its name with the options that differ from their defaults.

    If none differs, all options are given, since a name without options gets defaults for the token grid.
    Raises: TypeError: neither text nor processor. ValueError: the text is invalid.
    """
    from .mechanisms.attn_spec import AttentionSpec, parse_attention

    if isinstance(attn, AcceleratedAttnProcessor):
        values = {field.name: getattr(attn, field.name) for field in fields(attn)}
        changed = {field.name: values[field.name] for field in fields(attn) if values[field.name] != field.default}
        return AttentionSpec(attn.name, changed or values)
    if not isinstance(attn, (str, os.PathLike)):
        raise TypeError(f"--attn: expected text or a dit_accel processor, got {attn!r}")
    return parse_attention(os.fspath(attn))


def _student(attn: Attention) -> AttentionSpec | str:
    """As :func:`_spec`; an argument of ``load_attention`` is returned as text."""
    from .mechanisms.attn_spec import parse_student

    if isinstance(attn, (str, os.PathLike)):
        return parse_student(os.fspath(attn))
    return _spec(attn)


def _text(value: StrPath | None) -> str | None:
    return None if value is None else os.fspath(value)


def _path(value: StrPath | None) -> Path | None:
    return None if value is None else Path(value)


def _texts(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _weights(value: Mapping[str, float] | Sequence[str] | None) -> Sequence[str]:
    return [f"{name}={weight}" for name, weight in value.items()] if isinstance(value, Mapping) else value or ()


def _prompts(value: StrPath | Sequence[str] | None) -> Path | tuple[str, ...] | None:
    if value is None or isinstance(value, (str, os.PathLike)):
        return _path(value)
    return tuple(value)


def _prompt_check(pipeline: str) -> PromptCheck:
    """Scene checker of the embedded pipelines.

    Raises: ValueError: the pipeline was not trained on the embedded captions, or scipy is not installed.
    """
    from importlib.util import find_spec

    if not (Path(pipeline) / "training.json").is_file():
        raise ValueError(
            f"--captions is for pipelines that dit_accel.demo.training.train_embedded wrote, got {pipeline}"
        )
    if find_spec("scipy") is None:
        raise ValueError("--captions needs scipy: pip install 'dit-accel[train]'")
    from dit_accel.demo.scenes.evaluate_captions import prompt_check

    return prompt_check
