"""The ``dit-accel`` command.

Each subcommand imports its implementation when it runs, so that help and errors about arguments appear at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options

__all__ = ["app", "main"]

app = typer.Typer(
    name="dit-accel",
    help="Sub-quadratic attention for Hugging Face diffusers pipelines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(requested: bool) -> None:
    if requested:
        from .. import __version__

        typer.echo(f"dit-accel {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Sub-quadratic attention for Hugging Face diffusers pipelines."""


@app.command()
def compare(
    pipeline: Annotated[
        str | None,
        typer.Option(metavar="FOLDER_OR_HUB_ID", help="A diffusers pipeline; default: the embedded image pipeline."),
    ] = None,
    video: options.Video = False,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Prompt; repeatable.")] = None,
    attn: options.Attentions = None,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Denoising steps.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of every picture.")] = 0,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Output folder.")] = Path("compare"),
) -> int:
    """Generate the same prompts with dense attention and with each mechanism, and compare time and image quality.

    Writes compare.png (and compare.mp4 for clips), report.json and each picture into the output folder. Steps, size
    and number of frames default to the pipeline's.
    """
    from rich.console import Console

    from ..common.environment import pick_device, pick_dtype
    from ..common.errors import BadInput
    from ..common.files import require_writable
    from ..common.signals import Stopped
    from ..comparison.request import Request
    from ..comparison.run import run
    from ..mechanisms.attn_spec import parse_student
    from ..mechanisms.registry import PROCESSORS

    try:
        embedded = _embedded(pipeline, video)
        if any(not text.strip() for text in prompt or ()):
            raise ValueError("a --prompt is empty")
        defaults = [name for name, kind in PROCESSORS.items() if kind.any_host]
        if pipeline is None:
            defaults = embedded.students(defaults)
        students = tuple(parse_student(text) for text in attn or defaults)
        target = pick_device(device)
        precision = pick_dtype(dtype, target)
        require_writable(out)
    except ValueError as error:
        raise BadInput(str(error)) from None
    request = Request(
        pipeline, video, tuple(prompt or ()), students, steps, seed, height, width, frames, target, precision, out,
        tuple(sys.argv),
    )  # fmt: skip
    try:
        return run(request, Console())
    except Stopped as stop:
        print(f"dit-accel: stopped by {stop}; finished results are in {out}", file=sys.stderr)
        return stop.status


@app.command()
def convert(
    attn: Annotated[str, typer.Option(metavar="SPEC", help="Target attention, in the format of compare --attn.")],
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Output folder; run the same command again to resume an interrupted run."),
    ],
    pipeline: options.Teacher = None,
    video: options.Video = False,
    recipe: options.Recipe = None,
    train: options.Train = None,
    rank: options.Rank = 16,
    lora_layers: options.LoraLayers = "attention",
    convert_layers: options.ConvertLayers = None,
    data: options.TrainingData = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Train on samples that the teacher generates.")
    ] = False,
    prompts: options.Prompts = None,
    samples: options.Samples = 64,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    size: options.Sizes = None,
    fps: options.FrameRate = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Samples per batch and process.")] = 4,
    accumulate: options.Accumulate = 1,
    lr: options.LearningRate = None,
    warmup: options.Warmup = 50,
    schedule: options.Schedule = "constant",
    sampling: options.TimestepSampling = "shift",
    caption_dropout: options.CaptionDropout = 0.0,
    loss_weight: options.LossWeights = None,
    mixed_precision: options.MixedPrecision = None,
    gradient_checkpointing: options.GradientCheckpointing = False,
    cuda_graph: options.CudaGraph = False,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Random seed.")] = 0,
    save_every: options.SaveEvery = 200,
    save_dtype: options.SaveDtype = "float32",
    sample_every: options.SampleEvery = 0,
    report: options.ReportSamples = 8,
    repository: options.Repository = None,
    tracker: options.Tracker = None,
    device: options.AccelerateDevice = None,
) -> int:
    """Fine-tune a pipeline to use a sub-quadratic mechanism.

    If a run is interrupted, run the same command again: it resumes from the last checkpoint.

    Writes into the output folder: dit_accel.safetensors for load_attention, README.md (a model card), report/ (of
    evaluate), convert.json, samples/ and checkpoint.pt.
    """
    from rich.console import Console

    from ..common.errors import BadInput
    from ..common.files import explain_os_error
    from ..common.signals import Stopped
    from ..conversion.card import check_hub
    from ..conversion.finish import finish
    from ..conversion.recipes.recipe import RECIPES, parse_weight
    from ..conversion.request import DTYPES, LORA_LAYERS, SAMPLINGS, SCHEDULES, TRAINABLE, Request
    from ..conversion.run import Diverged, run
    from ..mechanisms.attn_spec import parse_attention

    try:
        source = _source(
            pipeline, video, data, data_free, prompts, samples, (height, width, frames), size or [], fps, seed, device,
            out,
        )  # fmt: skip
        spec = parse_attention(attn)
        recipe = recipe or ("clear" if spec.name == "clear" else "sla")
        if recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; available: {', '.join(RECIPES)}")
        if train is not None and train not in TRAINABLE:
            raise ValueError(f"--train takes {', '.join(TRAINABLE)}, got {train!r}")
        if lora_layers not in LORA_LAYERS:
            raise ValueError(f"--lora-layers takes {' or '.join(LORA_LAYERS)}, got {lora_layers!r}")
        precision = _precision(mixed_precision, device)
        if save_dtype not in DTYPES:
            raise ValueError(f"--save-dtype takes {', '.join(DTYPES)}, got {save_dtype!r}")
        if sampling not in SAMPLINGS:
            raise ValueError(f"--timestep-sampling takes {', '.join(SAMPLINGS)}, got {sampling!r}")
        weights = tuple(map(parse_weight, loss_weight or ()))
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"--caption-dropout takes a share from 0 to below 1, got {caption_dropout}")
        if schedule not in SCHEDULES:
            raise ValueError(f"--lr-schedule takes {' or '.join(SCHEDULES)}, got {schedule!r}")
        if lr is not None and not 0 < lr < float("inf"):
            raise ValueError(f"--lr must be above 0, got {lr}")
        if repository is not None:
            check_hub(repository)
    except ValueError as error:
        raise BadInput(str(error)) from None
    request = Request(
        source, spec, recipe, train, rank, steps, batch, accumulate, lr, warmup, precision, gradient_checkpointing,
        save_every, sample_every, tracker, convert_layers, lora_layers, schedule, save_dtype,
        sampling, weights, cuda_graph, caption_dropout,
    )  # fmt: skip
    console = Console()
    try:
        run(request, console)
        finish(request, report, repository, console)
        return 0
    except Stopped as stop:
        print(f"dit-accel: stopped by {stop}; run the same command again to resume", file=sys.stderr)
        return stop.status
    except Diverged as error:
        print(f"dit-accel: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        reason = explain_os_error(error, out)
        print(f"dit-accel: {reason}; the same command resumes from the last checkpoint", file=sys.stderr)
        return 1


@app.command()
def evaluate(
    attn: Annotated[
        str,
        typer.Option(
            metavar="FOLDER_OR_SPEC",
            help="The student: the output folder of convert, a hub id, or untrained attention in the format of "
            "compare --attn.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Output folder.")],
    pipeline: options.Teacher = None,
    video: options.Video = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER_OR_SHARDS", help="Pictures or clips with captions, in the formats of convert."),
    ] = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Evaluate on samples that the teacher generates.")
    ] = False,
    prompts: options.Prompts = None,
    samples: options.Samples = 16,
    levels: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of noise levels, evenly spaced from clean to noise.")
    ] = 8,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Noise levels per forward pass.")] = 1,
    pictures: Annotated[
        int, typer.Option(metavar="N", min=0, help="Number of prompts that both teacher and student draw.")
    ] = 2,
    captions: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Number of held-out captions that both draw and a scene checker verifies; embedded pipelines only.",
        ),
    ] = 0,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    size: options.Sizes = None,
    fps: options.FrameRate = None,
    mixed_precision: options.MixedPrecision = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Random seed; use another one than for the training.")
    ] = 1_000_000,
    device: options.AccelerateDevice = None,
) -> int:
    """Measure the quality of a converted pipeline against its teacher, on samples outside its training data.

    Writes evaluate.json, evaluate.png and pictures side by side into the output folder, and prints a table.
    """
    from rich.console import Console

    from ..common.errors import BadInput
    from ..common.signals import Stopped
    from ..conversion.evaluate import evaluate as measure
    from ..mechanisms.attn_spec import parse_student

    try:
        student = parse_student(attn)
        source = _source(
            pipeline, video, data, data_free, prompts, samples, (height, width, frames), size or [], fps, seed, device,
            out,
        )  # fmt: skip
        check = _prompt_check(source.pipeline) if captions else None
        precision = _precision(mixed_precision, device)
    except ValueError as error:
        raise BadInput(str(error)) from None
    try:
        return measure(source, student, levels, pictures, Console(), check, captions, precision, batch)
    except Stopped as stop:
        print(f"dit-accel: stopped by {stop}; finished samples are in {out}", file=sys.stderr)
        return stop.status


def _precision(requested: str | None, device: str | None) -> str:
    """Mixed precision for accelerate; by default bf16 on a GPU, else no.

    Raises: ValueError: an unknown precision.
    """
    import torch

    precision = requested or ("bf16" if torch.cuda.is_available() and device != "cpu" else "no")
    if precision not in ("no", "fp16", "bf16"):
        raise ValueError(f"--mixed-precision takes no, fp16 or bf16, got {precision!r}")
    return precision


def _prompt_check(pipeline: str) -> Any:
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


def _embedded(pipeline: str | None, video: bool) -> Any:
    """The embedded pipeline, used if no pipeline is given.

    Raises: ValueError: both ``--pipeline`` and ``--video`` are given.
    """
    from ..common.bundled import IMAGE, VIDEO

    if video and pipeline is not None:
        raise ValueError("give --pipeline or --video, not both: --video selects the embedded video pipeline")
    return VIDEO if video else IMAGE


def _source(
    pipeline: str | None,
    video: bool,
    data: Path | None,
    data_free: bool,
    prompts: Path | None,
    samples: int,
    size: tuple[int | None, int | None, int | None],
    sizes: list[str],
    fps: float | None,
    seed: int,
    device: str | None,
    out: Path,
) -> Any:
    """Source of the samples of convert and evaluate.

    Raises: ValueError: conflicting arguments, or a missing file or folder.
    """
    from ..common.bundled import OTHER_PROMPTS
    from ..common.files import require_writable
    from ..conversion.data.buckets import parse_size
    from ..conversion.request import Source

    embedded = _embedded(pipeline, video)
    if (data is None) == (not data_free):
        raise ValueError("give --data with a folder or .tar shards, or --data-free")
    if sizes and any(length is not None for length in size):
        raise ValueError("give --size, or --height, --width and --frames, not both")
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"--fps must be above 0, got {fps}")
    if fps is not None and data is None:
        raise ValueError(
            "--fps applies to clips given with --data: clips of the teacher have the pipeline's frame rate"
        )
    if device not in (None, "cpu"):
        raise ValueError(f"--device takes cpu, got {device!r}; without --device, accelerate selects the GPU")
    texts = OTHER_PROMPTS if pipeline is not None else embedded.prompts
    if prompts is not None:
        if not prompts.is_file():
            raise ValueError(f"--prompts: there is no file {prompts}")
        texts = tuple(filter(None, map(str.strip, prompts.read_text(encoding="utf-8").splitlines())))
        if not texts:
            raise ValueError(f"--prompts: {prompts} contains no prompt; write one per line")
    require_writable(out)
    buckets = tuple(map(parse_size, sizes))
    return Source(pipeline or str(embedded.folder), data, texts, samples, *size, buckets, fps, seed, device, out)


@app.command()
def demo(
    pipeline: Annotated[
        str | None,
        typer.Option(metavar="FOLDER_OR_HUB_ID", help="A diffusers pipeline; default: both embedded pipelines."),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = None,
    share: options.Share = False,
    allow_host: options.AllowHost = None,
    allow_frame: options.AllowFrame = None,
) -> int:
    """Start a web page to compare, inspect, time and convert attention mechanisms."""
    from importlib.util import find_spec

    from dit_accel.demo.ui.access import Access

    from ..common.environment import pick_device, pick_dtype
    from ..common.errors import BadInput
    from ..common.signals import Stopped

    if any(find_spec(package) is None for package in ("gradio", "matplotlib")):
        raise BadInput("the demo needs gradio and matplotlib: pip install 'dit-accel[demo]'")
    try:
        target = pick_device(device)
        precision = pick_dtype(dtype, target)
        access = Access(host, allow_host or (), allow_frame or ())
    except ValueError as error:
        raise BadInput(str(error)) from None
    from dit_accel.demo.serve import serve

    try:
        serve(pipeline, target, precision, access, port, share)
    except Stopped as stop:
        return stop.status
    except OSError as error:
        raise BadInput(f"cannot serve on {host}, port {port or '7860 and up'}: {error}") from None
    return 0


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="attention|step|report [OPTIONS]",
)  # fmt: skip
def bench(context: typer.Context) -> int:
    """Time attention calls and whole denoiser steps against dense attention on this GPU; see `bench --help`."""
    from ..bench.command import bench as run_bench  # has its own parser: python -m dit_accel.bench runs without typer

    return run_bench(context.args, "dit-accel bench")


def _fail(message: str, status: int) -> None:
    print(f"dit-accel: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit. Exit status: 0 success, 1 a part failed, 2 bad input (one line on stderr), 130 or 143
    stopped by SIGINT or SIGTERM."""
    from ..common.errors import BadInput
    from ..common.files import CannotWrite
    from ..common.signals import interruptible

    try:
        with interruptible():
            status: Any = app(arguments, prog_name="dit-accel", standalone_mode=False)
    except Exception as error:
        describe_usage = getattr(error, "format_message", None)  # typer's own errors
        if describe_usage is not None:
            _fail(describe_usage(), 2)
        if isinstance(error, BadInput):
            _fail(str(error), 2)
        if isinstance(error, CannotWrite):
            _fail(str(error), 1)
        raise
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
