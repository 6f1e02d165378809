"""Converting a pipeline while a page looks on: `dit-accel convert`'s own run, on a copy of the pipeline, in a turn."""

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

from dit_accel.attn_spec import AttentionSpec, short_options
from dit_accel.compare.sizes import token_grid
from dit_accel.convert.recipes import RECIPES
from dit_accel.convert.request import Request, Source
from dit_accel.convert.run import Diverged, run
from dit_accel.demo.write_scenes import write_scenes
from dit_accel.errors import BadInput
from dit_accel.weights import FILE_NAME

from .engine import Cancelled, Engine, Loaded, Stop
from .training_watch import Asked, TrainingWatch
from .work import Waiting

__all__ = ["Converted", "Wish", "command_line", "convert", "expected_seconds", "is_embedded"]

SCENES = {"image": 32, "video": 16}
TEACHER_SAMPLES = 8  # of pipelines whose data is not there: drawn by themselves
PICTURES = 4  # while a conversion runs, and one before
RANK = 16
_LEAST_BETWEEN = 4  # steps from picture to picture: each takes as long as a few
_SEED = 1
_SAVE_EVERY = 50
_WARMUP = 4  # the same for any number of steps, so that it can be raised
# on two cores, measured: a step of training, and all else
_SECONDS = {"image": (2.2, 70), "video": (2.5, 80)}
_USUAL_CORES = 2


@dataclass(frozen=True)
class Wish:
    """What a person asks for. train, lr: None = the recipe's. prompts: the first is drawn while training goes on; a
    pipeline that is not embedded draws what it is trained on from all of them."""

    kind: str
    attention: AttentionSpec
    recipe: str
    train: str | None
    steps: int
    lr: float | None
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Converted:
    """file: what `load_attention` takes. label: by which Compare offers it. new_steps: 0: it had been done before."""

    label: str
    file: Path
    new_steps: int


def is_embedded(source: str) -> bool:
    """Whether a pipeline was trained on scenes, which can be rendered at will."""
    return (Path(source) / "training.json").is_file()


def expected_seconds(engine: Engine, kind: str, steps: int) -> float | None:
    """How long a conversion of an embedded pipeline takes; None: not known for others."""
    if engine.device.type != "cpu" or not is_embedded(engine.about(kind).source):
        return None
    each, rest = _SECONDS[kind]
    return (each * steps + rest) * _USUAL_CORES / min(8, os.cpu_count() or _USUAL_CORES)


def convert(engine: Engine, wish: Wish, anew: bool, stop: Stop, tell: Callable[[Any], None]) -> None:
    """Go on with what was done for the same wish, or begin anew; tells Waiting, Preparing, Step, Distance and Drawn,
    and at last Converted. The engine's own pipeline is not touched: the turn is for the machine.

    Raises: BadInput: what has to be changed. Cancelled: what was done is kept.
    """
    with engine.turn(wish.kind, stop, lambda before: tell(Waiting(before))) as loaded:
        request = _request(engine, loaded, wish, engine.folder / "conversions")
        folder = _folder_for(request, anew)
        request = _in_folder(request, folder)
        watch = TrainingWatch(request.steps, folder, stop, tell)
        try:
            _prepare(loaded, request, engine.folder / "samples")
            watch.check()
            run(request, Console(quiet=True), watch)
        except Asked:
            raise Cancelled from None
        except Diverged:
            raise BadInput(
                f"At step {watch.done + 1} the loss was no number any more. Choose a smaller learning rate; these "
                "weights are not offered in Compare."
            ) from None
        except (OSError, RuntimeError, SafetensorError) as error:
            said = _of_disk(error, watch.done)
            if said is None:
                raise
            raise said from error
    offered = _keep(folder, f"{wish.attention.name}-{watch.done}-steps")
    label = _label(engine, wish, offered, watch.done)
    engine.add_conversion(wish.kind, label, offered)
    tell(Converted(label, offered / FILE_NAME, watch.new_steps))


def _of_disk(error: Exception, done: int) -> BadInput | None:
    """What is said when nothing could be written; None: it was something else."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full or "PytorchStreamWriter" in str(error):  # torch.save does not say why
        return BadInput(
            f"The disk is full, at step {done}. Make room and press Convert again: it goes on from what was saved."
        )
    if isinstance(error, OSError):
        return BadInput(f"Writing or reading failed at step {done}: {error.strerror or error}.")
    return None


def _keep(folder: Path, name: str) -> Path:
    """The finished file in a folder of its own: going on writes another and leaves this one as it is."""
    kept = folder / name
    kept.mkdir(exist_ok=True)
    if not (kept / FILE_NAME).exists():
        os.link(folder / FILE_NAME, kept / FILE_NAME)
    return kept


def _label(engine: Engine, wish: Wish, folder: Path, steps: int) -> str:
    """Told apart from those of other folders."""
    name = f"{wish.attention.name.upper()}, converted here ({wish.recipe}, {steps} steps)"
    there = engine.conversions(wish.kind)
    label, number = name, 2
    while there.get(label, folder) != folder:
        label, number = f"{name} {number}", number + 1
    return label


def _request(engine: Engine, loaded: Loaded, wish: Wish, out: Path) -> Request:
    """Raises: BadInput: numbers out of range."""
    if wish.recipe not in RECIPES:
        raise BadInput("Choose a recipe from the list.")
    if wish.lr is not None and not 0 < wish.lr < math.inf:
        raise BadInput("The learning rate must be above 0.")
    scenes, size = is_embedded(loaded.source), loaded.size
    source = Source(
        loaded.source, engine.folder / f"scenes-{wish.kind}" if scenes else None, wish.prompts,
        SCENES[wish.kind] if scenes else TEACHER_SAMPLES, size.height, size.width, size.frames, (), None, _SEED,
        "cpu" if engine.device.type == "cpu" else None, out,
    )  # fmt: skip
    return Request(
        source, wish.attention, wish.recipe, wish.train, RANK, wish.steps, 1, 1, wish.lr, _WARMUP,
        "bf16" if engine.device.type == "cuda" else "no", False, _SAVE_EVERY,
        max(_LEAST_BETWEEN, wish.steps // PICTURES), None,
        save_dtype="float16",
    )  # fmt: skip


def _in_folder(request: Request, folder: Path) -> Request:
    return replace(request, source=replace(request.source, out=folder))


def _folder_for(request: Request, anew: bool) -> Path:
    """The latest of this request, by what it has to have in common; one that nobody uses yet if it is to begin anew."""
    told = json.dumps(request.fingerprint(), sort_keys=True)
    name = hashlib.sha256(told.encode()).hexdigest()[:12]
    mine = f"{request.attention.name}-{request.recipe}-{name}"
    number = len(list(request.source.out.glob(f"{mine}-*"))) + 1
    if number > 1 and not anew:
        number -= 1
    folder = request.source.out / f"{mine}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _prepare(loaded: Loaded, request: Request, samples: Path) -> None:
    """Scenes to train on, rendered once; what is encoded of them is shared by all conversions of the pipeline."""
    source = request.source
    if source.data is not None and not (source.data / "metadata.jsonl").is_file():
        threads = torch.get_num_threads()
        try:
            write_scenes(source.data, source.samples, loaded.kind == "video", source.seed, size=loaded.size.height)
        finally:
            torch.set_num_threads(threads)  # it draws with one
    told = json.dumps([source.pipeline, source.data and str(source.data), source.prompts if not source.data else None])
    shared = samples / hashlib.sha256(told.encode()).hexdigest()[:12]
    shared.mkdir(parents=True, exist_ok=True)
    if not (source.out / "samples").exists():
        (source.out / "samples").symlink_to(shared)


def command_line(engine: Engine, wish: Wish) -> str:
    """What does the same in a shell."""
    loaded = engine.about(wish.kind)
    request = _request(engine, loaded, wish, Path())
    processor = wish.attention.processor(token_grid(loaded.pipe, loaded.size))
    words = ["dit-accel convert", "--attn", f"{wish.attention.name}:{short_options(processor)}"]
    before = ""
    if request.source.data is not None:
        before = (
            f"python -m dit_accel.demo.write_scenes {wish.kind} --out scenes --count {request.source.samples} "
            f"--seed {_SEED} && "
        )
        words += [*(["--video"] if wish.kind == "video" else []), "--data", "scenes"]
    else:
        words += ["--pipeline", shlex.quote(loaded.source), "--data-free", "--prompts", "prompts.txt"]
        words += ["--samples", str(request.source.samples), "--size", _size(loaded)]
    words += ["--recipe", wish.recipe, *([] if wish.train is None else ["--train", wish.train])]
    words += [] if wish.lr is None else ["--lr", f"{wish.lr:g}"]
    words += ["--steps", str(wish.steps), "--batch", "1", "--warmup", str(request.warmup), "--seed", str(_SEED)]
    words += ["--save-dtype", request.save_dtype, "--sample-every", str(request.sample_every)]
    words += ["--device", "cpu"] if request.source.device == "cpu" else []
    return before + " ".join([*words, "--out", f"my-{wish.attention.name}"])


def _size(loaded: Loaded) -> str:
    size = loaded.size
    return "x".join(str(length) for length in (size.height, size.width, size.frames) if length)
