"""The ``dit-accel`` command. What it does is imported when it does it, so that help and bad arguments are quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="dit-accel",
    help="Sub-quadratic attention for Hugging Face diffusers pipelines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_ATTN_HELP = (
    "Attention to compare with dense, as NAME or NAME:key=value,key=value, or a folder, file or hub id of attention "
    "that was trained; repeatable; default all four: sla, clear, llsa, gna. Options are those of the processors, "
    "lengths per axis as 16x16 or 2x8x8: gna:window=16x16,stride=8. Layers may differ: "
    "gna:window=12x12;window=40x40@blocks.1 has the larger window where blocks.1 is found in a layer's name. Without "
    "options, about a tenth of the logits each: "
    "sla critical 0.1 with tile_order; llsa block_size 16 and topk 8; clear a radius and gna a window that cover a "
    "tenth of the token grid (64×64: radius 11.4; window 20x20, stride 4x4)."
)
_RECIPE_HELP = (
    "sla (the model's own objective; trains all); clear (with distillation from the teacher's predictions and "
    "attention outputs; trains the attention layers); attention-transfer (LoLCATs: the new parameters to the teacher's "
    "attention outputs, layer by layer, then LoRA); linvideo (chooses the layers to convert, and matches "
    "distributions; trains all); lit (with distillation from the teacher's predictions; trains all); default that of "
    "the mechanism's paper, else sla."
)
_LR_HELP = (
    "Learning rate, of the last stage where a recipe has several; those before keep their proportion to it; default "
    "the recipe's."
)
_DATA_HELP = (
    "Pictures, for video pipelines clips, with captions: a folder of files with a .txt beside each or a "
    "metadata.jsonl; or a webdataset: a .tar, a folder of such, or a pattern as shards-{000..003}.tar."
)
_PRECISION_HELP = "no, fp16 or bf16; default bf16 on a GPU, else no."
_SIZE_HELP = (
    "A size to train on, as 512x768 or for clips 480x832x81; repeatable: each picture or clip goes to the one whose "
    "proportions are nearest. Instead of --height, --width and --frames."
)
_FPS_HELP = (
    "Frames a second taken from clips, out of their middle; default what the pipeline says, else frames evenly over "
    "the whole clip."
)


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

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
        typer.Option(metavar="FOLDER_OR_HUB_ID", help="A diffusers pipeline; default the embedded image pipeline."),
    ] = None,
    video: Annotated[bool, typer.Option("--video", help="The embedded video pipeline instead.")] = False,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="What to draw; repeatable.")] = None,
    attn: Annotated[list[str] | None, typer.Option(metavar="SPEC", help=_ATTN_HELP)] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Denoising steps.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of every picture.")] = 0,
    height: Annotated[int | None, typer.Option(metavar="PIXELS", min=1)] = None,
    width: Annotated[int | None, typer.Option(metavar="PIXELS", min=1)] = None,
    frames: Annotated[int | None, typer.Option(metavar="N", min=1, help="Length of a clip.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 or mps; default the best.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="float32, float16, bfloat16; default bfloat16 on CUDA, else float32."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")] = Path("compare"),
) -> int:
    """Draw the same prompts with dense attention and with each mechanism, side by side, and say what each cost.

    Writes into the out folder: compare.png (and compare.mp4 for clips), report.json, and every picture by itself.
    Steps, size and length that are not given are the pipeline's own.
    """
    from rich.console import Console

    from .attn_spec import parse_student
    from .compare.request import Request
    from .compare.run import run
    from .environment import pick_device, pick_dtype
    from .errors import BadInput
    from .files import require_writable
    from .processor import PROCESSORS
    from .signals import Stopped

    try:
        embedded = _embedded(pipeline, video)
        if any(not text.strip() for text in prompt or ()):
            raise ValueError("a --prompt is empty")
        usual = [name for name, kind in PROCESSORS.items() if kind.any_host]
        if pipeline is None:
            usual = embedded.students(usual)
        students = tuple(parse_student(text) for text in attn or usual)
        where = pick_device(device)
        precision = pick_dtype(dtype, where)
        require_writable(out)
    except ValueError as error:
        raise BadInput(str(error)) from None
    request = Request(
        pipeline, video, tuple(prompt or ()), students, steps, seed, height, width, frames, where, precision, out,
        tuple(sys.argv),
    )  # fmt: skip
    try:
        return run(request, Console())
    except Stopped as stop:
        print(f"dit-accel: stopped by {stop}; what was finished is in {out}", file=sys.stderr)
        return stop.status


@app.command()
def convert(
    attn: Annotated[str, typer.Option(metavar="SPEC", help="Attention to convert to, as for compare.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where everything goes; the same again goes on.")],
    pipeline: Annotated[
        str | None,
        typer.Option(metavar="FOLDER_OR_HUB_ID", help="The teacher; default the embedded image pipeline."),
    ] = None,
    video: Annotated[bool, typer.Option("--video", help="The embedded video pipeline instead.")] = False,
    recipe: Annotated[str | None, typer.Option(metavar="NAME", help=_RECIPE_HELP)] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT", help="new (the added parameters), attention, lora, or full; default the recipe's."
        ),
    ] = None,
    rank: Annotated[int, typer.Option(metavar="N", min=1, help="Of LoRA.")] = 16,
    lora_layers: Annotated[
        str,
        typer.Option(
            metavar="WHICH", help="Linear layers with a LoRA: attention, or blocks, with all of the blocks around it."
        ),
    ] = "attention",
    convert_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Layers that linvideo chooses; default 8 of 15, which is the paper's 16 of 30."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER_OR_SHARDS", help=_DATA_HELP)] = None,
    data_free: Annotated[bool, typer.Option("--data-free", help="Train on what the teacher draws itself.")] = False,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="For --data-free, one on a line.")] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures or clips that the teacher draws.")] = 64,
    height: Annotated[int | None, typer.Option(metavar="PIXELS", min=1)] = None,
    width: Annotated[int | None, typer.Option(metavar="PIXELS", min=1)] = None,
    frames: Annotated[int | None, typer.Option(metavar="N", min=1, help="Length of a clip.")] = None,
    size: Annotated[list[str] | None, typer.Option(metavar="HxW[xFRAMES]", help=_SIZE_HELP)] = None,
    fps: Annotated[float | None, typer.Option(metavar="RATE", help=_FPS_HELP)] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps of the optimizer.")] = 1000,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Samples a step and process.")] = 4,
    accumulate: Annotated[int, typer.Option(metavar="N", min=1, help="Batches whose gradients make a step.")] = 1,
    lr: Annotated[float | None, typer.Option(metavar="RATE", help=_LR_HELP)] = None,
    warmup: Annotated[
        int, typer.Option(metavar="N", min=0, help="Steps until the rate is reached, in each stage of the recipe.")
    ] = 50,
    schedule: Annotated[
        str, typer.Option("--lr-schedule", metavar="NAME", help="After the warm-up: constant, or cosine, down to 0.")
    ] = "constant",
    sampling: Annotated[
        str,
        typer.Option(
            "--timestep-sampling",
            metavar="NAME",
            help="Noise levels of flow matching: shift (logit-normal, shifted as the scheduler's), uniform, with more "
            "of little noise, or mixed, half of each.",
        ),
    ] = "shift",
    caption_dropout: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Of samples trained on with an empty caption: 0.1 for pipelines that use guidance."
        ),
    ] = 0.0,
    loss_weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WEIGHT",
            help="Instead of the recipe's: flow, prediction, variance or attention; repeatable.",
        ),
    ] = None,
    mixed_precision: Annotated[str | None, typer.Option(metavar="NAME", help=_PRECISION_HELP)] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    cuda_graph: Annotated[
        bool,
        typer.Option("--cuda-graph", help="Capture a step's gradients: small models need not wait for Python."),
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", min=0)] = 0,
    save_every: Annotated[int, typer.Option(metavar="N", min=1, help="Steps between checkpoints.")] = 200,
    save_dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Of the finished file: float32, bfloat16 or float16.")
    ] = "float32",
    sample_every: Annotated[
        int, typer.Option(metavar="N", min=0, help="Steps between pictures of student and teacher; 0 = none.")
    ] = 0,
    report: Annotated[
        int, typer.Option(metavar="N", min=0, help="New samples of the teacher on which both are compared at the end.")
    ] = 8,
    repository: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Upload the result, its card and report, there."),
    ] = None,
    tracker: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where accelerate logs the losses: tensorboard, wandb, …")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu; default what accelerate finds.")] = None,
) -> int:
    """Fine-tune a pipeline into a mechanism. Stopped at any time, the same command goes on from its last checkpoint.

    Writes into the out folder: dit_accel.safetensors for load_attention, README.md (a model card), report/ (of
    evaluate), convert.json, samples/ and checkpoint.pt.
    """
    from rich.console import Console

    from .attn_spec import parse_attention
    from .convert.card import check_hub
    from .convert.finish import finish
    from .convert.recipes import RECIPES, parse_weight
    from .convert.request import DTYPES, LORA_LAYERS, SAMPLINGS, SCHEDULES, TRAINABLE, Request
    from .convert.run import Diverged, run
    from .errors import BadInput
    from .files import explain_os_error
    from .signals import Stopped

    try:
        source = _source(
            pipeline, video, data, data_free, prompts, samples, (height, width, frames), size or [], fps, seed, device,
            out,
        )  # fmt: skip
        spec = parse_attention(attn)
        recipe = recipe or ("clear" if spec.name == "clear" else "sla")
        if recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; there are: {', '.join(RECIPES)}")
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
        print(f"dit-accel: stopped by {stop}; the same command goes on", file=sys.stderr)
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
            help="The student: what convert wrote, a hub id, or attention not trained, as for compare.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")],
    pipeline: Annotated[
        str | None,
        typer.Option(metavar="FOLDER_OR_HUB_ID", help="The teacher; default the embedded image pipeline."),
    ] = None,
    video: Annotated[bool, typer.Option("--video", help="The embedded video pipeline instead.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER_OR_SHARDS", help="Pictures or clips with captions, as for convert."),
    ] = None,
    data_free: Annotated[bool, typer.Option("--data-free", help="What the teacher draws itself.")] = False,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="One on a line.")] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures or clips that the teacher draws.")] = 16,
    levels: Annotated[int, typer.Option(metavar="N", min=1, help="Noise levels, evenly from clean to noise.")] = 8,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Noise levels at a time.")] = 1,
    pictures: Annotated[int, typer.Option(metavar="N", min=0, help="Prompts that both draw.")] = 2,
    captions: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Held-out captions that both draw, checked; for the embedded pipelines."),
    ] = 0,
    height: Annotated[int | None, typer.Option(metavar="PIXELS", min=1)] = None,
    width: Annotated[int | None, typer.Option(metavar="PIXELS", min=1)] = None,
    frames: Annotated[int | None, typer.Option(metavar="N", min=1, help="Length of a clip.")] = None,
    size: Annotated[list[str] | None, typer.Option(metavar="HxW[xFRAMES]", help=_SIZE_HELP)] = None,
    fps: Annotated[float | None, typer.Option(metavar="RATE", help=_FPS_HELP)] = None,
    mixed_precision: Annotated[str | None, typer.Option(metavar="NAME", help=_PRECISION_HELP)] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Another than that of the training.")] = 1_000_000,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu; default what accelerate finds.")] = None,
) -> int:
    """Measure what a converted pipeline has lost against its teacher, on samples that it was not trained on.

    Writes evaluate.json, evaluate.png and pictures side by side into the out folder, and prints a table.
    """
    from rich.console import Console

    from .attn_spec import parse_student
    from .convert.evaluate import evaluate as measure
    from .errors import BadInput
    from .signals import Stopped

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
        print(f"dit-accel: stopped by {stop}; the samples are in {out}", file=sys.stderr)
        return stop.status


def _precision(asked: str | None, device: str | None) -> str:
    """Raises: ValueError: one that accelerate does not know."""
    import torch

    precision = asked or ("bf16" if torch.cuda.is_available() and device != "cpu" else "no")
    if precision not in ("no", "fp16", "bf16"):
        raise ValueError(f"--mixed-precision takes no, fp16 or bf16, got {precision!r}")
    return precision


def _prompt_check(pipeline: str) -> Any:
    """Raises: ValueError: a pipeline that was not trained on the embedded ones' captions, or scipy is not installed."""
    from importlib.util import find_spec

    if not (Path(pipeline) / "training.json").is_file():
        raise ValueError(f"--captions is for pipelines that dit_accel.demo.train_embedded wrote, got {pipeline}")
    if find_spec("scipy") is None:
        raise ValueError("--captions needs scipy: pip install 'dit-accel[train]'")
    from .demo.evaluate_captions import prompt_check

    return prompt_check


def _embedded(pipeline: str | None, video: bool) -> Any:
    """The embedded pipeline that stands in for one that was not given.

    Raises: ValueError: both are asked for.
    """
    from .bundled import IMAGE, VIDEO

    if video and pipeline is not None:
        raise ValueError("give --pipeline or --video, not both: --video is the embedded video pipeline")
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
    """Where convert and evaluate have their samples from.

    Raises: ValueError: arguments that do not go together, or a file or folder that is not there.
    """
    from .bundled import OTHER_PROMPTS
    from .convert.buckets import parse_size
    from .convert.request import Source
    from .files import require_writable

    embedded = _embedded(pipeline, video)
    if (data is None) == (not data_free):
        raise ValueError("give --data with a folder or .tar shards, or --data-free")
    if sizes and any(length is not None for length in size):
        raise ValueError("give --size, or --height, --width and --frames, not both")
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"--fps must be above 0, got {fps}")
    if fps is not None and data is None:
        raise ValueError("--fps is for clips given with --data: what the teacher draws has no other rate than its own")
    if device not in (None, "cpu"):
        raise ValueError(f"--device takes cpu, got {device!r}; else accelerate takes the GPU that it finds")
    texts = OTHER_PROMPTS if pipeline is not None else embedded.prompts
    if prompts is not None:
        if not prompts.is_file():
            raise ValueError(f"there is no file {prompts}")
        texts = tuple(filter(None, map(str.strip, prompts.read_text(encoding="utf-8").splitlines())))
        if not texts:
            raise ValueError(f"{prompts} has no prompt")
    require_writable(out)
    buckets = tuple(map(parse_size, sizes))
    return Source(pipeline or str(embedded.folder), data, texts, samples, *size, buckets, fps, seed, device, out)


@app.command()
def demo(
    pipeline: Annotated[
        str | None,
        typer.Option(metavar="FOLDER_OR_HUB_ID", help="A diffusers pipeline; default the two embedded ones."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 or mps; default the best.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="As for compare.")] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Who may open the page: 127.0.0.1 this machine, 0.0.0.0 all.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=65535, help="Default the first free one from 7860 on.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="A public address, through Gradio's servers, for a week.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name the page is reached by, such as a proxy's; repeatable."),
    ] = None,
    allow_frame: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="A site that may show the page in a frame; repeatable.")
    ] = None,
) -> int:
    """Open a page where dense and cheaper attention are compared, looked into, timed and converted."""
    from importlib.util import find_spec

    from .demo.ui.access import Access
    from .environment import pick_device, pick_dtype
    from .errors import BadInput
    from .signals import Stopped

    if any(find_spec(package) is None for package in ("gradio", "matplotlib")):
        raise BadInput("the page needs gradio and matplotlib: pip install 'dit-accel[demo]'")
    try:
        where = pick_device(device)
        precision = pick_dtype(dtype, where)
        access = Access(host, allow_host or (), allow_frame or ())
    except ValueError as error:
        raise BadInput(str(error)) from None
    from .demo.serve import serve

    try:
        serve(pipeline, where, precision, access, port, share)
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
    """Time attention calls and whole denoiser steps against dense on this GPU; `bench --help` says more."""
    from .bench.command import bench as run_bench  # its own parser: python -m dit_accel.bench goes without typer

    return run_bench(context.args, "dit-accel bench")


def _fail(message: str, status: int) -> None:
    print(f"dit-accel: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Exit status: 0 done, 1 failed in part, 2 bad input (one line on stderr), 130 or 143 stopped."""
    from .errors import BadInput
    from .files import CannotWrite
    from .signals import interruptible

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
