"""Options of the ``dit-accel`` commands: types, value names and help texts, for :mod:`.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ..common import choices
from ..mechanisms.attn_spec import attention_help

__all__ = [
    "AccelerateDevice", "Accumulate", "AllowFrame", "AllowHost", "Attentions", "CaptionDropout", "ConvertLayers",
    "CudaGraph", "Device", "Dtype", "FrameRate", "Frames", "GradientCheckpointing", "Height", "Host", "LearningRate",
    "LoraLayers", "LossWeights", "MixedPrecision", "Port", "Prompts", "Rank", "Recipe", "ReportSamples", "Repository",
    "SampleEvery", "Samples", "SaveDtype", "SaveEvery", "Schedule", "Share", "Sizes", "Teacher", "TimestepSampling",
    "Tracker", "Train", "TrainingData", "Video", "Warmup", "Width",
]  # fmt: skip

_RECIPE_HELP = (
    "sla (the model's own objective; trains all weights); clear (adds distillation from the teacher's predictions and "
    "attention outputs; trains the attention layers); attention-transfer (LoLCATs: fits the new parameters to the "
    "teacher's attention outputs, layer by layer, then trains LoRA); linvideo (selects the layers to convert and uses "
    "distribution matching; trains all weights); lit (adds distillation from the teacher's predictions; trains all "
    "weights). Default: clear for clear attention, else sla."
)
_LR_HELP = (
    "Learning rate. If a recipe has several stages, the rate of the last one; the rates of the other stages are scaled "
    "by the same factor. Default: the recipe's."
)
_DATA_HELP = (
    "Pictures with captions (clips with captions for video pipelines): a folder with one .txt per file or a "
    "metadata.jsonl; or a webdataset: a .tar file, a folder of .tar files, or a pattern such as "
    "shards-{000..003}.tar."
)
_SIZE_HELP = (
    "Training size, such as 512x768 for pictures or 480x832x81 for clips. Repeatable: each picture or clip uses the "
    "size with the nearest aspect ratio. Replaces --height, --width and --frames."
)
_FPS_HELP = (
    "Frames per second sampled from the middle of each clip. Default: the pipeline's frame rate; if it has none, "
    "frames are spread evenly over the whole clip."
)


def _choice(kind: Any, help: str) -> Any:
    """Option with the choices of a ``Literal`` type; the called function checks the value, with its own message."""
    return typer.Option(metavar="|".join(get_args(kind)), parser=str, help=help)


# several commands
Teacher = Annotated[
    str | None, typer.Option(metavar="FOLDER_OR_HUB_ID", help="The teacher; default: the embedded image pipeline.")
]
Video = Annotated[bool, typer.Option("--video", help="Use the embedded video pipeline.")]
Height = Annotated[int | None, typer.Option(metavar="PIXELS", help="Height; default: the pipeline's.")]
Width = Annotated[int | None, typer.Option(metavar="PIXELS", help="Width; default: the pipeline's.")]
Frames = Annotated[int | None, typer.Option(metavar="N", help="Frames per clip; default: the pipeline's.")]
Sizes = Annotated[list[str] | None, typer.Option(metavar="HxW[xFRAMES]", help=_SIZE_HELP)]
FrameRate = Annotated[float | None, typer.Option(metavar="RATE", help=_FPS_HELP)]
Prompts = Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts for --data-free, one per line.")]
Samples = Annotated[
    int, typer.Option(metavar="N", help="Number of samples that the teacher generates for --data-free.")
]
MixedPrecision = Annotated[
    choices.MixedPrecision | None, _choice(choices.MixedPrecision, "Mixed precision; default: bf16 on a GPU, else no.")
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Device: cpu, cuda, cuda:1 or mps; default: CUDA, else MPS, else CPU."),
]
AccelerateDevice = Annotated[
    str | None, typer.Option(metavar="NAME", help="Device: cpu; default: the device that accelerate selects.")
]
Dtype = Annotated[choices.Dtype | None, _choice(choices.Dtype, "Precision; default: bfloat16 on CUDA, else float32.")]

# compare
Attentions = Annotated[list[str] | None, typer.Option(metavar="SPEC", help=attention_help())]

# convert
Recipe = Annotated[choices.Recipe | None, _choice(choices.Recipe, _RECIPE_HELP)]
Train = Annotated[
    choices.Train | None,
    _choice(
        choices.Train,
        "Trained parameters: new (those the mechanism adds), attention, lora or full; default: the recipe's.",
    ),
]
Rank = Annotated[int, typer.Option(metavar="N", help="LoRA rank.")]
LoraLayers = Annotated[
    choices.LoraLayers,
    _choice(
        choices.LoraLayers,
        "Linear layers that get a LoRA: attention (those of the converted layers), or blocks (all linear "
        "layers of their transformer blocks).",
    ),
]
ConvertLayers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Number of layers that linvideo converts; default: 8 of 15, the paper's share of 16 of 30.",
    ),
]
Accumulate = Annotated[int, typer.Option(metavar="N", help="Gradient accumulation: batches per optimizer step.")]
LearningRate = Annotated[float | None, typer.Option(metavar="RATE", help=_LR_HELP)]
Warmup = Annotated[int, typer.Option(metavar="N", help="Learning rate warm-up steps in each stage of the recipe.")]
Schedule = Annotated[
    choices.Schedule,
    _choice(choices.Schedule, "Learning rate after the warm-up: constant, or cosine (decays to 0)."),
]
TimestepSampling = Annotated[
    choices.Sampling,
    _choice(
        choices.Sampling,
        "Distribution of the noise levels in flow matching: shift (logit-normal with the scheduler's shift), "
        "uniform (more low-noise samples), or mixed (half of each).",
    ),
]
CaptionDropout = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="Share of training samples with an empty caption; use 0.1 for pipelines with guidance.",
    ),
]
LossWeights = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=WEIGHT",
        help="Loss weight that replaces the recipe's: flow, prediction, variance or attention; repeatable.",
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Recompute activations in the backward pass to save memory."),
]
CudaGraph = Annotated[
    bool,
    typer.Option(
        "--cuda-graph",
        help="Replay the forward and backward pass as a CUDA graph; faster for small models, which are limited by "
        "kernel launches.",
    ),
]
SaveEvery = Annotated[int, typer.Option(metavar="N", help="Steps between checkpoints.")]
SaveDtype = Annotated[choices.SaveDtype, _choice(choices.SaveDtype, "Precision of the saved file.")]
SampleEvery = Annotated[
    int, typer.Option(metavar="N", help="Steps between sample pictures of student and teacher; 0: none.")
]
ReportSamples = Annotated[
    int, typer.Option(metavar="N", help="New teacher samples for the evaluation at the end; 0: none.")
]
Repository = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="Hub repository to upload weights, model card and report to."),
]
Tracker = Annotated[
    str | None, typer.Option(metavar="NAME", help="Tracker of accelerate for the losses, such as tensorboard or wandb.")
]
TrainingData = Annotated[Path | None, typer.Option(metavar="FOLDER_OR_SHARDS", help=_DATA_HELP)]

# demo
Host = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS", help="Address to listen on: 127.0.0.1 for this machine only, 0.0.0.0 for the network."
    ),
]
Port = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, max=65535, help="Port; default: the first free port from 7860 on."),
]
Share = Annotated[
    bool, typer.Option("--share", help="Create a public link through Gradio's servers, valid for one week.")
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Additional host name of the page, such as a proxy's; repeatable."),
]
AllowFrame = Annotated[
    list[str] | None,
    typer.Option(metavar="ORIGIN", help="Site that may embed the page in a frame; repeatable."),
]
