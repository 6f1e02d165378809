"""Conversion of a pipeline: prepare samples, train the student, save the result."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

import torch
from accelerate import Accelerator
from rich.console import Console

from ..common.environment import about_machine, about_versions
from ..common.errors import BadInput, Diverged
from ..common.files import read_json, write_json
from ..common.pipeline_loading import load_pipeline
from ..common.progress import progress_bar
from ..install.installation import processors_by_layer
from ..weights.save import save_attention
from .card import REPORT
from .checkpoint import check_steps, load_checkpoint
from .data.buckets import find_buckets, processors_for
from .data.prepare import lock_for_run, make_samples, offload_unused_components, only_denoiser
from .parallel.launch import check_graph, check_launch, new_parallel
from .parallel.protocol import Parallel
from .pictures import Pictures
from .recipes.capture import unconditional
from .recipes.noise import noise_process
from .recipes.recipe import RECIPES, Recipe, reweighted
from .recipes.stages import check_request, plan
from .request import Request
from .trainer import Trainer
from .watch import Watch

__all__ = ["Diverged", "run"]

ABOUT = "convert.json"


def run(request: Request, console: Console, watch: Watch | None = None) -> None:
    """Run a conversion; it resumes from the last checkpoint of the same request in the output folder.

    Args: watch: callbacks for progress.
    Raises:
        BadInput: the request cannot be carried out; raised before any work is done.
        Diverged: the loss became NaN or infinite.
        CannotWrite: a file cannot be written (full disk); the last checkpoint is kept.
        KeyboardInterrupt: the run was stopped; its state is in a checkpoint.
    """
    watch = watch or Watch()
    try:
        recipe = reweighted(RECIPES[request.recipe], dict(request.weights))
        check_request(request, recipe)
        check_launch(request.mixed_precision, recipe.selects)
    except ValueError as error:
        raise BadInput(str(error)) from error
    accelerator = Accelerator(
        cpu=request.source.device == "cpu", mixed_precision=request.mixed_precision, log_with=_tracker(request),
        project_dir=request.source.out,
    )  # fmt: skip
    try:
        parallel = new_parallel(accelerator, request.batch, request.mixed_precision)
        check_graph(request, parallel)
    except ValueError as error:
        raise BadInput(str(error)) from error
    with lock_for_run(request.source.out, accelerator.is_main_process, console):
        _convert(request, recipe, parallel, console, watch)


def _convert(request: Request, recipe: Recipe, parallel: Parallel, console: Console, watch: Watch) -> None:
    accelerator = parallel.accelerator

    def tell(text: str) -> None:
        if accelerator.is_main_process:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    if accelerator.is_main_process:
        _claim(request, accelerator.num_processes, console)
    pipe = load_pipeline(request.source.pipeline, torch.float32, accelerator.device)
    try:
        buckets = find_buckets(request.source, pipe)
        process = replace(noise_process(pipe.scheduler), sampling=request.sampling).to(accelerator.device)
        component, model = only_denoiser(pipe)
        model.register_forward_pre_hook(lambda *_: watch.check())
        parallel.check_model(model)
        choices = processors_for(request.attention, buckets, tell)
        processors_by_layer({component: model}, choices)  # raises for layers that do not exist, before any work
        stages = plan(request, recipe, model, choices[0][1])
        samples = make_samples(request.source, accelerator, pipe, model, buckets, console, watch.sample)
        if request.caption_dropout:
            samples.drop_captions({str(bucket.size): unconditional(pipe, model, bucket.call) for bucket in buckets})
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from error
    pictures = None
    if request.sample_every and (accelerator.is_main_process or parallel.collective):
        source = request.source
        pictures = Pictures(source.out / "pictures", pipe, component, buckets[0].call, source.prompts[:2], source.seed)
    offload_unused_components(pipe, component)
    watch.ready(model, process, samples)
    trainer = Trainer(request, stages, parallel, pipe, model, choices, process, samples)
    trainer.resume(console)

    def draw(step: int) -> None:
        if request.sample_every and step % request.sample_every == 0:
            if pictures is not None:
                with parallel.drawing(model):
                    for path in pictures.against_teacher(step, accelerator.is_main_process):
                        watch.picture(step, path)
            accelerator.wait_for_everyone()

    def after(step: int) -> None:
        draw(step)
        watch.step(step, trainer.history[-1])

    accelerator.init_trackers("dit_accel_convert")
    watch.begin(trainer.step, trainer.history)
    missing = pictures is not None and (trainer.step == 0 or pictures.is_missing(trainer.step))
    if accelerator.gather(torch.tensor(missing, device=accelerator.device)).any():  # a run was killed while drawing
        draw(trainer.step)
    with progress_bar(console, disable=not accelerator.is_main_process) as progress:
        trainer.train(progress, after)
    if accelerator.is_main_process and read_json(request.source.out / ABOUT).get("steps") != trainer.step:
        (request.source.out / REPORT / "evaluate.json").unlink(missing_ok=True)  # it describes earlier weights
    if accelerator.is_main_process or parallel.collective:
        path = save_attention(pipe, request.source.out, getattr(torch, request.save_dtype))
    accelerator.wait_for_everyone()  # no process may leave while another still gathers
    accelerator.end_training()
    if accelerator.is_main_process:
        _write_about(request, accelerator, trainer, "complete")
        console.print(f"Wrote {path}", highlight=False, soft_wrap=True)


def _tracker(request: Request) -> str | None:
    """Name of the requested tracker. Raises: BadInput: it is not installed."""
    from accelerate.tracking import get_available_trackers

    there = [str(name) for name in get_available_trackers()]
    if request.tracker is not None and request.tracker not in there:
        raise BadInput(f"--tracker {request.tracker} is not installed; installed are: {', '.join(there) or 'none'}")
    return request.tracker


def _claim(request: Request, processes: int, console: Console) -> None:
    """Claim the output folder for this request by writing ``convert.json``, or check that it is this request's.

    Raises: BadInput: the folder holds another conversion, or is damaged.
    """
    out = request.source.out
    path = out / ABOUT
    ours = {**request.fingerprint(), "processes": processes}
    try:
        if path.exists():
            about = read_json(path)
            if not isinstance(about.get("request"), dict):
                raise ValueError(f"{path} has no request of a conversion: restore it, or choose another --out")
            earlier = {**about["request"], "processes": about.get("processes")}
            other = [key for key in ours if earlier.get(key) != ours[key]]
            if other:
                changes = "; ".join(f"{key} {earlier.get(key)!r}, now {ours[key]!r}" for key in other[:4])
                raise ValueError(
                    f"{out} holds another conversion ({changes}): choose another --out, or remove the folder"
                )
        tell = partial(console.print, highlight=False, soft_wrap=True)
        state = load_checkpoint(out, mapped=True, tell=tell)  # checked before the model is loaded
        if state is not None:
            check_steps(out, state["step"], request.steps)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if not path.exists():
        write_json(path, {"status": "running", "request": request.fingerprint(), "processes": processes})


def _write_about(request: Request, accelerator: Accelerator, trainer: Trainer, status: str) -> None:
    """Write ``convert.json``."""
    named = dict(trainer.host.named_parameters())
    write_json(request.source.out / ABOUT, {
        "status": status,
        "request": request.fingerprint(),
        "recipe": asdict(trainer.plan.recipe),
        "stages": [stage.about() for stage in trainer.plan.stages],
        "layers": trainer.layers,
        "scores": trainer.scores,
        "steps": trainer.step,
        "processes": accelerator.num_processes,
        "trained_parameters": sum(named[name].numel() for name in trainer.learned if name in named),
        "machine": about_machine(accelerator.device, torch.float32),
        "versions": about_versions(),
        "history": trainer.history,
    })  # fmt: skip
