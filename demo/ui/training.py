"""Conversion of a pipeline from the app: the run of `dit-accel convert`, on a copy of the pipeline, with progress."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from dit_accel.common.choices import Recipe, Train
from dit_accel.common.errors import BadInput
from dit_accel.comparison.sizes import token_grid
from dit_accel.conversion.recipes.recipe import RECIPES
from dit_accel.conversion.request import Request, Source
from dit_accel.conversion.run import Diverged, run
from dit_accel.demo.scenes.write_scenes import write_scenes
from dit_accel.mechanisms.attn_spec import AttentionSpec, short_options
from dit_accel.weights.tensors import FILE_NAME

from .engine import Cancelled, Engine, Loaded, Stop
from .training_watch import StopRequested, TrainingWatch
from .work import Waiting

__all__ = ["ConversionOptions", "Converted", "command_line", "convert", "expected_seconds", "is_embedded"]

SCENES = {"image": 32, "video": 16}
TEACHER_SAMPLES = 8  # drawn by the pipeline itself if it has no training data
PICTURES = 4  # during a conversion, and one before
RANK = 16
_MIN_STEPS_BETWEEN_PICTURES = 4  # a picture takes as long as a few steps
_SEED = 1
_SAVE_EVERY = 50
_WARMUP = 4  # the same for any number of steps, so that a run can be resumed with more steps
# measured on two cores: seconds per training step, and for everything else
_MEASURED_SECONDS = {"image": (2.2, 70), "video": (2.5, 80)}
_REFERENCE_CORES = 2


@dataclass(frozen=True)
class ConversionOptions:
    """Options of a conversion.

    train, lr: None = the recipe's default. prompts: the first is drawn during training; a pipeline that is not embedded
    draws its training samples from all of them.
    """

    kind: str
    attention: AttentionSpec
    recipe: Recipe
    train: Train | None
    steps: int
    lr: float | None
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Converted:
    """Result of a conversion.

    label: name in the list of Compare. file: file for `load_attention`. new_steps: 0 if it had been trained before.
    """

    label: str
    file: Path
    new_steps: int


def is_embedded(source: str) -> bool:
    """True for the embedded pipelines, which were trained on rendered scenes."""
    return (Path(source) / "training.json").is_file()


def expected_seconds(engine: Engine, kind: str, steps: int) -> float | None:
    """Estimated time of a conversion of an embedded pipeline on the CPU; None for others."""
    if engine.device.type != "cpu" or not is_embedded(engine.about(kind).source):
        return None
    each, rest = _MEASURED_SECONDS[kind]
    return (each * steps + rest) * _REFERENCE_CORES / min(8, os.cpu_count() or _REFERENCE_CORES)


def convert(
    engine: Engine, options: ConversionOptions, restart: bool, stop: Stop, report: Callable[[Any], None]
) -> None:
    """Convert a copy of the pipeline; resume the last run with the same options, unless ``restart``.

    Reports Waiting, Preparing, Step, Distance and Drawn, then Converted. The turn reserves the machine; the engine's
    pipeline is not modified.

    Raises: BadInput: a value that has to be changed. Cancelled: stopped; a later call resumes.
    """
    with engine.turn(options.kind, stop, lambda before: report(Waiting(before))) as loaded:
        request = _request(engine, loaded, options, engine.folder / "conversions")
        folder = _folder_for(request, restart)
        request = _in_folder(request, folder)
        watch = TrainingWatch(request.steps, folder, stop, report)
        try:
            _prepare(loaded, request, engine.folder / "samples")
            watch.check()
            run(request, Console(quiet=True), watch)
        except StopRequested:
            raise Cancelled from None
        except Diverged:
            raise BadInput(
                f"The loss was not finite at step {watch.done + 1}. Choose a smaller learning rate. These weights are "
                "not offered in Compare."
            ) from None
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = _disk_error(error, watch.done)
            if problem is None:
                raise
            raise problem from error
    offered = _publish(folder, f"{options.attention.name}-{watch.done}-steps")
    label = _label(engine, options, offered, watch.done)
    engine.add_conversion(options.kind, label, offered)
    report(Converted(label, offered / FILE_NAME, watch.new_steps))


def _disk_error(error: Exception, done: int) -> BadInput | None:
    """Message for an error of the disk; None for other errors."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full or "PytorchStreamWriter" in str(error):  # torch.save does not say why
        return BadInput(
            f"The disk is full at step {done}. Free some space and press Convert again to resume from the last "
            "checkpoint."
        )
    if isinstance(error, OSError):
        return BadInput(f"Writing or reading failed at step {done}: {error.strerror or error}.")
    return None


def _publish(folder: Path, name: str) -> Path:
    """Link the finished file into a folder of its own, so that a resumed run does not overwrite it."""
    published = folder / name
    published.mkdir(exist_ok=True)
    if not (published / FILE_NAME).exists():
        os.link(folder / FILE_NAME, published / FILE_NAME)
    return published


def _label(engine: Engine, options: ConversionOptions, folder: Path, steps: int) -> str:
    """Label that no other conversion has."""
    name = f"{options.attention.name.upper()}, converted here ({options.recipe}, {steps} steps)"
    conversions = engine.conversions(options.kind)
    label, number = name, 2
    while conversions.get(label, folder) != folder:
        label, number = f"{name} {number}", number + 1
    return label


def _request(engine: Engine, loaded: Loaded, options: ConversionOptions, out: Path) -> Request:
    """Build the request of the training run.

    Raises: BadInput: numbers out of range.
    """
    if options.recipe not in RECIPES:
        raise BadInput("Choose a recipe from the list.")
    if options.lr is not None and not 0 < options.lr < math.inf:
        raise BadInput("The learning rate must be above 0.")
    scenes, size = is_embedded(loaded.source), loaded.size
    source = Source(
        pipeline=loaded.source, data=engine.folder / f"scenes-{options.kind}" if scenes else None,
        prompts=options.prompts, samples=SCENES[options.kind] if scenes else TEACHER_SAMPLES, height=size.height,
        width=size.width, frames=size.frames, seed=_SEED, device="cpu" if engine.device.type == "cpu" else None,
        out=out,
    )  # fmt: skip
    return Request(
        source=source, attention=options.attention, recipe=options.recipe, train=options.train, rank=RANK,
        steps=options.steps, batch=1, lr=options.lr, warmup=_WARMUP,
        mixed_precision="bf16" if engine.device.type == "cuda" else "no", save_every=_SAVE_EVERY,
        sample_every=max(_MIN_STEPS_BETWEEN_PICTURES, options.steps // PICTURES), save_dtype="float16",
    )  # fmt: skip


def _in_folder(request: Request, folder: Path) -> Request:
    return replace(request, source=replace(request.source, out=folder))


def _folder_for(request: Request, restart: bool) -> Path:
    """Folder of the latest run with the same fingerprint; a new folder if there is none or with ``restart``."""
    identity = json.dumps(request.fingerprint(), sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:12]
    prefix = f"{request.attention.name}-{request.recipe}-{name}"
    number = len(list(request.source.out.glob(f"{prefix}-*"))) + 1
    if number > 1 and not restart:
        number -= 1
    folder = request.source.out / f"{prefix}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _prepare(loaded: Loaded, request: Request, samples: Path) -> None:
    """Render the training scenes once, and share encoded samples between conversions of the same pipeline."""
    source = request.source
    if source.data is not None and not (source.data / "metadata.jsonl").is_file():
        threads = torch.get_num_threads()
        try:
            write_scenes(source.data, source.samples, loaded.kind == "video", source.seed, size=loaded.size.height)
        finally:
            torch.set_num_threads(threads)  # write_scenes sets it to 1
    identity = json.dumps(
        [source.pipeline, source.data and str(source.data), source.prompts if not source.data else None]
    )
    shared = samples / hashlib.sha256(identity.encode()).hexdigest()[:12]
    shared.mkdir(parents=True, exist_ok=True)
    if not (source.out / "samples").exists():
        (source.out / "samples").symlink_to(shared)


def command_line(engine: Engine, options: ConversionOptions) -> str:
    """Shell command of the same conversion."""
    loaded = engine.about(options.kind)
    request = _request(engine, loaded, options, Path())
    processor = options.attention.processor(token_grid(loaded.pipe, loaded.size))
    words = ["dit-accel convert", "--attn", f"{options.attention.name}:{short_options(processor)}"]
    before = ""
    if request.source.data is not None:
        before = (
            f"python -m dit_accel.demo.scenes.write_scenes {options.kind} --out scenes "
            f"--count {request.source.samples} --seed {_SEED} && "
        )
        words += [*(["--video"] if options.kind == "video" else []), "--data", "scenes"]
    else:
        words += ["--pipeline", shlex.quote(loaded.source), "--data-free", "--prompts", "prompts.txt"]
        words += ["--samples", str(request.source.samples), "--size", _size(loaded)]
    words += ["--recipe", options.recipe, *([] if options.train is None else ["--train", options.train])]
    words += [] if options.lr is None else ["--lr", f"{options.lr:g}"]
    words += ["--steps", str(options.steps), "--batch", "1", "--warmup", str(request.warmup), "--seed", str(_SEED)]
    words += ["--save-dtype", request.save_dtype, "--sample-every", str(request.sample_every)]
    words += ["--device", "cpu"] if request.source.device == "cpu" else []
    return before + " ".join([*words, "--out", f"my-{options.attention.name}"])


def _size(loaded: Loaded) -> str:
    size = loaded.size
    return "x".join(str(length) for length in (size.height, size.width, size.frames) if length)
