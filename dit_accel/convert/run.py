"""Convert a pipeline: prepare samples, train the student, write what was learned."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ..command import BadInput, deferred, undisturbed
from ..families import sites_of
from ..files import write_json
from ..install import installation_of, installed_layers, new_layer, set_attn_processor
from ..loading import load_pipeline
from ..machine import about_machine, about_versions
from ..save import save_attention
from .buckets import find_buckets, processor_for
from .capture import merge
from .checkpoint import load_checkpoint, save_checkpoint
from .lora import add_lora, require_peft, save_lora
from .noise import NoiseProcess, noise_process
from .objective import Losses, copy_teacher, losses_of
from .pictures import Pictures
from .prepare import make_samples, only_denoiser, progress_bar, put_away
from .recipes import RECIPES, Recipe
from .request import Request
from .samples import Samples, batches

__all__ = ["Diverged", "run"]

ABOUT = "convert.json"


class Diverged(RuntimeError):
    """The loss is no number any more."""


def run(request: Request, console: Console) -> int:
    """The whole conversion, from where an earlier run of the same request stopped.

    Returns: exit status 0.
    Raises: BadInput: something that cannot be done, before any work. Diverged: the loss became NaN or infinite.
        KeyboardInterrupt: stopped; a checkpoint holds what was done.
    """
    accelerator = Accelerator(
        cpu=request.source.device == "cpu", mixed_precision=request.mixed_precision, log_with=_tracker(request),
        project_dir=request.source.out,
    )  # fmt: skip
    recipe = RECIPES[request.recipe]
    if accelerator.is_main_process:
        _claim(request, accelerator.num_processes)
    pipe = load_pipeline(request.source.pipeline, torch.float32, accelerator.device)
    try:
        buckets = find_buckets(request.source, pipe)
        process = noise_process(pipe.scheduler)
        component, model = only_denoiser(pipe)
        processor = processor_for(request.attention, buckets, accelerator.print)
        scope = request.train or recipe.train
        trained = _trainable(model, processor, scope)
        if scope == "lora":
            require_peft()
        samples = make_samples(request.source, accelerator, pipe, model, buckets, console)
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from error
    pictures = None
    if request.sample_every and accelerator.is_main_process:
        source = request.source
        pictures = Pictures(source.out / "pictures", pipe, component, buckets[0].call, source.prompts[:2], source.seed)
    put_away(pipe, component)
    trainer = Trainer(request, recipe, accelerator, pipe, model, processor, trained, process, samples)
    trainer.resume(console)

    def after(step: int) -> None:
        if request.sample_every and step % request.sample_every == 0:
            if pictures is not None:
                pictures.against_teacher(step)
            accelerator.wait_for_everyone()

    accelerator.init_trackers("dit_accel_convert")
    with progress_bar(console, accelerator) as progress:
        trainer.train(progress, after)
    accelerator.end_training()
    if accelerator.is_main_process:
        path = save_attention(pipe, request.source.out)
        if (request.train or recipe.train) == "lora":
            save_lora(model, request.source.out)
        _about(request, accelerator, trainer, "complete")
        console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    return 0


def _tracker(request: Request) -> str | None:
    """Raises: BadInput: a tracker that is not installed."""
    from accelerate.tracking import get_available_trackers

    there = [str(name) for name in get_available_trackers()]
    if request.tracker is not None and request.tracker not in there:
        raise BadInput(f"--tracker {request.tracker} is not installed; there are: {', '.join(there) or 'none'}")
    return request.tracker


def _claim(request: Request, processes: int) -> None:
    """Whether the folder is this request's: another's must not be gone on with."""
    path = request.source.out / ABOUT
    if not path.is_file():
        write_json(path, {"status": "running", "request": request.fingerprint(), "processes": processes})
        return
    told = json.loads(path.read_text(encoding="utf-8"))
    earlier = {**told.get("request", {}), "processes": told.get("processes")}
    ours = {**request.fingerprint(), "processes": processes}
    other = [key for key in ours if earlier.get(key) != ours[key]]
    if other:
        changes = "; ".join(f"{key} {earlier.get(key)!r}, now {ours[key]!r}" for key in other[:4])
        raise BadInput(f"{request.source.out} holds another conversion ({changes}): choose another --out, or remove it")


def _trainable(model: nn.Module, processor: Any, scope: str) -> set[str]:
    """Names of the host's parameters that are trained, beside the mechanism's own.

    Raises: ValueError: nothing would be.
    """
    layers = [name for site in sites_of(model) for name in site.layers]
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    if scope == "full":
        chosen = set(names)
    elif scope == "attention":
        chosen = {name for name in names if any(name.startswith(f"{layer}.") for layer in layers)}
    added = [new_layer(processor, model.get_submodule(name), name) for name in layers[:1]]
    if not chosen and scope != "lora" and not any(list(layer.parameters()) for layer in added):
        raise ValueError(
            f"{processor.name} with these options adds no parameters, so --train new trains nothing: use --train "
            "attention, lora or full"
        )
    return chosen


class Trainer:
    """A student under training, one :meth:`step` after the other; all that is random follows from seed and step."""

    def __init__(
        self, request: Request, recipe: Recipe, accelerator: Accelerator, pipe: Any, model: nn.Module, processor: Any,
        trained: set[str], process: NoiseProcess, samples: Samples,
    ) -> None:  # fmt: skip
        self.request, self.recipe, self.accelerator, self.process = request, recipe, accelerator, process
        self.samples = samples
        model.requires_grad_(False)
        self.teacher = copy_teacher(model, trained) if recipe.prediction or recipe.attention else None
        set_attn_processor(pipe, processor)
        installation = installation_of(model)
        assert installation is not None
        for name in sorted(trained):  # so that they are saved, and reset puts the pretrained ones back
            installation.overwritten[name] = model.get_parameter(name).detach().to("cpu", copy=True)
        self.layers = list(installed_layers(model))
        if (request.train or recipe.train) == "lora":
            trained = {*add_lora(model, self.layers, request.rank, request.source.seed)}
        self.parameters = {
            name: p.requires_grad_() for name, p in model.named_parameters() if name in trained or ".dit_accel." in name
        }
        if request.gradient_checkpointing:
            getattr(model, "enable_gradient_checkpointing")()  # noqa: B009 (a diffusers model's)
        model.train()
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=request.lr or recipe.lr)
        self.model, self.optimizer = accelerator.prepare(model, self.optimizer)
        self.step, self.history, self.saved = 0, [], None
        self.kinds = samples.kinds

    step: int
    history: list[dict[str, float]]
    saved: int | None  # the step of the last checkpoint

    def resume(self, console: Console) -> None:
        """Go on from the checkpoint, if there is one."""
        try:
            state = load_checkpoint(self.request.source.out)
        except ValueError as error:
            raise BadInput(str(error)) from error
        if state is None:
            return
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history, self.saved = state["step"], state["history"], state["step"]
        if self.accelerator.is_main_process:
            console.print(f"Going on from step {self.step}", highlight=False)

    def train(self, progress: Progress, after: Callable[[int], None]) -> None:
        """All steps that are left, ``after`` each what is to be done then; a checkpoint every so many, at the end, and
        when stopped."""
        request, world = self.request, self.accelerator.num_processes
        order = batches(self.kinds, request.batch * world, request.source.seed)
        drawn = islice(order, self.step * request.accumulate, None)
        first, began = self.step, time.perf_counter()
        task = progress.add_task("training", total=request.steps, completed=self.step, told="")
        try:
            while self.step < request.steps:
                losses = self._take(list(islice(drawn, request.accumulate)))
                with deferred():  # a checkpoint holds whole steps
                    self.optimizer.step()
                    self.history.append(losses)
                    self.step += 1
                self.optimizer.zero_grad()
                self.accelerator.log(losses, step=self.step)
                told = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
                told += f", {(self.step - first) / (time.perf_counter() - began):.2f} steps/s"
                progress.update(task, advance=1, told=told)
                if self.step % request.save_every == 0 and self.step < request.steps:
                    self.save()
                after(self.step)
        except KeyboardInterrupt:
            with undisturbed():
                self.save()
            raise
        self.save()

    def _take(self, micro_batches: list[list[int]]) -> dict[str, float]:
        """The gradients of one step over so many batches. Returns: mean losses over all processes."""
        request, accelerator = self.request, self.accelerator
        rate = (request.lr or self.recipe.lr) * min(1.0, (self.step + 1) / max(1, request.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total: dict[str, Tensor] = {}
        for i, batch in enumerate(micro_batches):
            place = self.step * len(micro_batches) + i
            last = i + 1 == len(micro_batches)
            with nullcontext() if last else accelerator.no_sync(self.model):
                losses = self._losses(batch, place)
                accelerator.backward(losses.total / len(micro_batches))
            for name, part in {"loss": losses.total, **losses.parts}.items():
                total[name] = total.get(name, torch.zeros((), device=part.device)) + part.detach() / len(micro_batches)
        means = {name: float(accelerator.reduce(x, "mean")) for name, x in total.items()}
        if not all(map(_is_finite, means.values())):
            kept = (
                "there is no checkpoint yet" if self.saved is None else f"the checkpoint of step {self.saved} is kept"
            )
            raise Diverged(
                f"step {self.step + 1}: the loss is {means['loss']}; {kept}: begin anew with a smaller --lr in "
                "another --out"
            )
        accelerator.clip_grad_norm_(self.parameters.values(), 1.0)
        return means

    def _losses(self, batch: list[int], place: int) -> Losses:
        """Of this process's part of a batch, the place-th of the run."""
        accelerator, size = self.accelerator, self.request.batch
        first = accelerator.process_index * size
        chosen = [self.samples[i] for i in batch[first : first + size]]
        levels, noises = [], []
        for i, sample in enumerate(chosen, first):
            mixed = np.random.SeedSequence([self.request.source.seed, place, i]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(mixed[0]))
            levels.append(self.process.draw(generator))
            noises.append(torch.randn(sample.latents.shape, generator=generator))
        device = accelerator.device
        conditions = merge([sample.conditions for sample in chosen])
        conditions.tensors = {key: x.to(device) for key, x in conditions.tensors.items()}
        latents = torch.cat([sample.latents for sample in chosen]).to(device)
        with accelerator.autocast():
            return losses_of(
                self.recipe, self.model, self.teacher, self.layers, self.process, latents,
                torch.cat(noises).to(device), torch.tensor(levels, device=device), conditions,
            )  # fmt: skip

    def save(self) -> None:
        """A checkpoint, by the first process."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        save_checkpoint(self.request.source.out, {
            "step": self.step,
            "history": self.history,
            "parameters": {name: p.detach().cpu() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
        })  # fmt: skip
        self.saved = self.step


def _is_finite(x: float) -> bool:
    return x - x == 0


def _about(request: Request, accelerator: Accelerator, trainer: Trainer, status: str) -> None:
    write_json(request.source.out / ABOUT, {
        "status": status,
        "request": request.fingerprint(),
        "recipe": asdict(trainer.recipe),
        "steps": trainer.step,
        "processes": accelerator.num_processes,
        "trained_parameters": sum(p.numel() for p in trainer.parameters.values()),
        "machine": about_machine(accelerator.device, torch.float32),
        "versions": about_versions(),
        "history": trainer.history,
    })  # fmt: skip
