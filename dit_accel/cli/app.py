"""The ``dit-accel`` command.

Each subcommand imports its implementation when it runs, so that help and errors about arguments appear at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import dit_accel

from ..common.errors import BadInput, Diverged
from ..common.files import CannotWrite, explain_os_error
from ..common.signals import Stopped, interruptible
from . import options
from .bench import bench_app

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
        typer.echo(f"dit-accel {dit_accel.__version__}")
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
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of every picture.")] = 0,
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
    try:
        report = dit_accel.compare(**locals(), command=sys.argv)
    except Stopped as stop:
        print(f"dit-accel: stopped by {stop}; finished results are in {out}", file=sys.stderr)
        return stop.status
    return 0 if report.status == "complete" else 1


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
    steps: Annotated[int, typer.Option(metavar="N", help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(metavar="N", help="Samples per batch and process.")] = 4,
    accumulate: options.Accumulate = 1,
    lr: options.LearningRate = None,
    warmup: options.Warmup = 50,
    lr_schedule: options.Schedule = "constant",
    timestep_sampling: options.TimestepSampling = "shift",
    caption_dropout: options.CaptionDropout = 0.0,
    loss_weight: options.LossWeights = None,
    mixed_precision: options.MixedPrecision = None,
    gradient_checkpointing: options.GradientCheckpointing = False,
    cuda_graph: options.CudaGraph = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed.")] = 0,
    save_every: options.SaveEvery = 200,
    save_dtype: options.SaveDtype = "float32",
    sample_every: options.SampleEvery = 0,
    report: options.ReportSamples = 8,
    push_to_hub: options.Repository = None,
    tracker: options.Tracker = None,
    device: options.AccelerateDevice = None,
) -> int:
    """Fine-tune a pipeline to use a sub-quadratic mechanism.

    If a run is interrupted, run the same command again: it resumes from the last checkpoint.

    Writes into the output folder: dit_accel.safetensors for load_attention, README.md (a model card), report/ (of
    evaluate), convert.json, samples/ and checkpoint.pt.
    """
    try:
        dit_accel.convert(**locals())
    except Stopped as stop:
        print(f"dit-accel: stopped by {stop}; run the same command again to resume", file=sys.stderr)
        return stop.status
    except OSError as error:
        reason = explain_os_error(error, out)
        print(f"dit-accel: {reason}; the same command resumes from the last checkpoint", file=sys.stderr)
        return 1
    except Diverged as error:
        print(f"dit-accel: {error}", file=sys.stderr)
        return 1
    return 0


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
        int, typer.Option(metavar="N", help="Number of noise levels, evenly spaced from clean to noise.")
    ] = 8,
    batch: Annotated[int, typer.Option(metavar="N", help="Noise levels per forward pass.")] = 1,
    pictures: Annotated[
        int, typer.Option(metavar="N", help="Number of prompts that both teacher and student draw.")
    ] = 2,
    captions: Annotated[
        int,
        typer.Option(
            metavar="N",
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
        int, typer.Option(metavar="N", help="Random seed; use another one than for the training.")
    ] = 1_000_000,
    device: options.AccelerateDevice = None,
) -> int:
    """Measure the quality of a converted pipeline against its teacher, on samples outside its training data.

    Writes evaluate.json, evaluate.png and pictures side by side into the output folder, and prints a table.
    """
    try:
        dit_accel.evaluate(**locals())
    except Stopped as stop:
        print(f"dit-accel: stopped by {stop}; finished samples are in {out}", file=sys.stderr)
        return stop.status
    return 0


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


app.add_typer(bench_app, name="bench")


def _fail(message: str, status: int) -> None:
    print(f"dit-accel: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit. Exit status: 0 success, 1 a part failed, 2 bad input (one line on stderr), 130 or 143
    stopped by SIGINT or SIGTERM."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        with interruptible():
            status: Any = app(given, prog_name="dit-accel", standalone_mode=False, obj=given)
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
