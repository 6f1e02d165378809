"""The student under training: stages, steps, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ..attn_spec import ByLayer
from ..errors import BadInput
from ..install import installation_of, installed_layers, keep_layers, set_by_layer
from ..signals import Stopped, defer_interrupts, ignore_interrupts, record_interrupts
from .capture import merge
from .checkpoint import check_steps, load_checkpoint, save_checkpoint
from .graphed import GraphedGradients
from .lora import add_lora
from .noise import NoiseProcess
from .objective import Batch, copy_teacher, losses_of, transfer_loss
from .request import Request
from .samples import Samples, batches
from .selection import Selection
from .sharding import (
    average,
    gather,
    is_sharded,
    part_like,
    reshard,
    shard,
    through,
    whole_states,
    with_parts,
)
from .stages import Part, Plan, host_parameters
from .transfer import TeacherForced
from .zero import all_parts, autocast, is_zero, restore_part

__all__ = ["Diverged", "Trainer"]


_SPEAK_EVERY = 20.0  # seconds between lines, where the progress bar is not seen: in a file


class Diverged(RuntimeError):
    """The loss is no number any more."""


class Trainer:
    """A student that is trained one step after the other; all that is random follows from seed and step."""

    def __init__(
        self, request: Request, plan: Plan, accelerator: Accelerator, pipe: Any, host: nn.Module, choices: ByLayer,
        process: NoiseProcess, samples: Samples,
    ) -> None:  # fmt: skip
        self.request, self.plan, self.accelerator, self.process = request, plan, accelerator, process
        self.samples, self.kinds, self.host = samples, samples.kinds, host
        host.requires_grad_(False)
        self.sharded = is_sharded(accelerator)
        if self.sharded:
            host.to("cpu")  # of it and the teacher one block after the other comes back, in parts
        self.zero = is_zero(accelerator)
        self.compiles = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        self.pretrained = {part.scope: host_parameters(host, part.scope) for part in plan.parts}
        trained = set().union(*self.pretrained.values())
        self.teacher = self._new_teacher(trained) if plan.needs_teacher else None
        set_by_layer(pipe, choices)
        installation = installation_of(host)
        assert installation is not None
        for name in sorted(trained):  # so that they are saved, and reset puts the pretrained ones back
            installation.overwritten[name] = host.get_parameter(name).detach().to("cpu", copy=True)
        self.layers = list(installed_layers(host))
        if self.compiles:  # blocks share their code, and options by layer make graphs of it for student and teacher
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 4 * len(self.layers))
        if plan.needs_lora:
            add_lora(host, self.layers, request.lora_layers, request.rank, request.source.seed)
        if request.gradient_checkpointing:
            getattr(host, "enable_gradient_checkpointing")()  # noqa: B009 (a diffusers model's)
        host.train()
        if self.sharded:
            shard(accelerator, host, self.layers if any(part.stage.transfer for part in plan.parts) else ())
        self.step, self.history, self.saved = 0, [], None
        self.model, self.selection, self.scores, self.learned, self.graphs = None, None, None, set(), None
        self._enter(0)

    step: int
    history: list[dict[str, float]]
    saved: int | None  # the step of the last checkpoint
    index: int  # of the stage
    sharded: bool  # by FSDP, which keeps the host the same module; its parameters are so from the beginning
    model: Any  # what the stage calls, as accelerate has wrapped it
    optimizer: Any
    rates: list[float]  # of its groups, once warm
    parameters: dict[str, nn.Parameter]  # that the stage trains
    learned: set[str]  # names of those that any stage so far has trained
    selection: Selection | None  # while layers are chosen
    graphs: GraphedGradients | None  # of the stage, where they are asked for
    scores: dict[str, float] | None  # that they were chosen by

    @property
    def part(self) -> Part:
        return self.plan.parts[self.index]

    def _new_teacher(self, trained: set[str]) -> nn.Module:
        """Under FSDP a copy of all, since two models cannot share what is split; of its own parts no process has more
        than of the student's."""
        if not self.sharded:
            teacher = copy_teacher(self.host, trained)
            return self.accelerator.prepare_model(teacher, evaluation_mode=True) if self.compiles else teacher
        teacher = copy_teacher(self.host, {name for name, _ in self.host.named_parameters()})
        shard(self.accelerator, teacher)
        getattr(teacher, "set_reshard_after_forward")(True)  # noqa: B009 (FSDPModule's): no backward follows
        return teacher

    def _enter(self, index: int) -> None:
        """Leave the stage before, and make ready what this one trains and calls."""
        reshard(self.host)
        if self.model is not None:
            if self.zero:
                self.model.destroy()  # its hooks on the parameters
            if not self.sharded:
                self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model = self.optimizer = None
            self.accelerator.free_memory()
        if self.selection is not None:
            self._select(self.selection)
        self.index = index
        if self.part.stage.selection:
            assert self.plan.number is not None
            self.selection = Selection(installed_layers(self.host), self.plan.number, self.accelerator.device)
        self.host.requires_grad_(False)
        self.parameters = self.part.trains(dict(self.host.named_parameters()), self.pretrained[self.part.scope])
        self.learned |= set(self.parameters)
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        called = TeacherForced(self.host, self.layers) if self.part.stage.transfer else self.host
        if self.sharded:
            self.model = through(self.host, called.forward) if self.part.stage.transfer else called
            self.optimizer = self.accelerator.prepare_optimizer(self._new_optimizer())
        else:
            self.model, self.optimizer = self.accelerator.prepare(called, self._new_optimizer())
        if self.request.cuda_graph:
            self.graphs = GraphedGradients(self._gradients, self.parameters.values())

    def _select(self, selection: Selection) -> None:
        """The layers with the highest scores stay converted, and no others."""
        self.layers, self.scores, self.selection = selection.chosen(), selection.scores(), None
        selection.remove()
        keep_layers(self.host, self.layers)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; scores have a group of their own."""
        groups: list[dict[str, Any]] = [{"params": list(self.parameters.values())}]
        if self.selection is not None:
            groups.append(self.selection.optimizer_group(self.part.end - self.part.first))
            ours = set(map(id, groups[1]["params"]))
            groups[0]["params"] = [p for p in self.parameters.values() if id(p) not in ours]
        optimizer = torch.optim.AdamW(groups, lr=self.part.lr)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def resume(self, console: Console) -> None:
        """Go on from the checkpoint, if there is one.

        Raises: BadInput: it cannot be read, or is of another run.
        """
        out, first = self.request.source.out, self.accelerator.is_main_process
        try:
            state = load_checkpoint(
                out, self.sharded, lambda text: console.print(text, soft_wrap=True, highlight=False)
            )
            if state is not None:
                check_steps(out, state["step"], self.request.steps)
        except ValueError as error:
            raise BadInput(str(error)) from error
        if state is None:
            return
        if ("parts" in state["optimizer"]) != self.zero:
            how = "without" if self.zero else "under"
            raise BadInput(
                f"the checkpoint was written {how} DeepSpeed: go on as it was begun, or choose another --out"
            )
        try:
            self._enter_stage_of(state)
        except (LookupError, TypeError, ValueError) as error:
            raise BadInput(
                f"the checkpoint in {out} is of another model or other options ({error}): choose another --out, or "
                "remove it to begin anew"
            ) from error
        named = dict(self.host.named_parameters())
        with torch.no_grad():
            for name, value in state["parameters"].items():
                named[name].copy_(part_like(value, named[name]))
        if self.zero:
            restore_part(self.optimizer, state["optimizer"], self.accelerator.process_index)
        else:
            self.optimizer.load_state_dict(with_parts(state["optimizer"], self.optimizer))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.saved = state["step"], state["history"], state["step"]
        if first:
            console.print(f"Going on from step {self.step}", highlight=False)

    def _enter_stage_of(self, state: dict[str, Any]) -> None:
        """Raises: ValueError, LookupError, TypeError: a checkpoint of other stages or parameters; none were loaded."""
        step, stage, parts = state["step"], state["stage"], self.plan.parts
        if not (0 <= stage < len(parts) and parts[stage].first <= step <= parts[stage].end):
            raise ValueError(f"its step {step} is in stage {stage + 1}; here there are {len(parts)}")
        for index in range(1, stage + 1):
            if self.selection is not None:
                self.selection.restore(state["scores"])
            self._enter(index)
        ours = {name: tuple(p.shape) for name, p in self.host.named_parameters() if name in self.learned}
        theirs = {name: tuple(value.shape) for name, value in state["parameters"].items()}
        for name in (*ours, *theirs):
            if ours.get(name) != theirs.get(name):
                raise ValueError(f"{name}: expected {ours.get(name, 'none')}, got {theirs.get(name, 'none')}")

    def train(self, progress: Progress, after: Callable[[int], None]) -> None:
        """All steps that are left, ``after`` each what is to be done then; a checkpoint every so many, at the end, and
        when stopped."""
        many = self.accelerator.num_processes > 1 or self.zero  # whose step is taken before it is counted
        try:
            with record_interrupts() if many else nullcontext(list[int]()) as came:
                self._steps(progress, after, came)
        except KeyboardInterrupt:
            with ignore_interrupts():
                self.save()
            raise
        self.save()

    def _steps(self, progress: Progress, after: Callable[[int], None], came: list[int]) -> None:
        """came: signals to stop, where they are only noted; else a step that has begun is broken off."""
        request, world = self.request, self.accelerator.num_processes
        order = batches(self.kinds, request.batch * world, request.source.seed)
        drawn = islice(order, self.step * request.accumulate, None)
        first, began = self.step, time.perf_counter()
        spoken = began
        task = progress.add_task(self._called(), total=request.steps, completed=self.step, told="")
        together = world > 1 or self.zero  # signals are only noted
        at_once = nullcontext if together else defer_interrupts
        while self.step < request.steps:
            if self.step == self.part.end:
                with at_once():
                    self._enter(self.index + 1)
                progress.update(task, description=self._called())
            losses = self._take(list(islice(drawn, request.accumulate)))
            with at_once():  # a checkpoint holds whole steps
                self.optimizer.step()
                if self.selection is not None:
                    self.selection.clamp()
                self.history.append(losses)
                self.step += 1
            self.optimizer.zero_grad(set_to_none=self.graphs is None)
            self.accelerator.log(losses, step=self.step)
            told = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
            told += f", {(self.step - first) / (time.perf_counter() - began):.2f} steps/s"
            progress.update(task, advance=1, told=told)
            if not progress.console.is_terminal and time.perf_counter() - spoken >= _SPEAK_EVERY:
                spoken = time.perf_counter()
                progress.console.print(f"step {self.step} of {request.steps}: {told}", highlight=False, soft_wrap=True)
            if self.step % request.save_every == 0 and self.step < request.steps:
                self.save()
            after(self.step)
            if together:
                self._stop_together(came)

    def _stop_together(self, came: list[int]) -> None:
        """Raises: Stopped: some process was asked to stop; in all of them, after the same step."""
        asked = torch.tensor(came[0] if came else 0, device=self.accelerator.device)
        number = int(self.accelerator.gather(asked).max())
        if number:
            raise Stopped(number)

    def _called(self) -> str:
        """The stage, as progress says it."""
        several = f" ({self.index + 1} of {len(self.plan.parts)})" if len(self.plan.parts) > 1 else ""
        return self.part.stage.name + several

    def _take(self, micro_batches: list[list[int]]) -> dict[str, float]:
        """The gradients of one step over so many batches. Returns: mean losses over all processes."""
        accelerator = self.accelerator
        ramp = min(1.0, (self.step - self.part.first + 1) / max(1, self.request.warmup))
        if self.request.schedule == "cosine":
            ramp *= 0.5 * (1 + math.cos(math.pi * self.part.done(self.step)))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * ramp
        total: dict[str, Tensor] = {}
        for i, batch in enumerate(micro_batches):
            place = self.step * len(micro_batches) + i
            last = i + 1 == len(micro_batches)
            if self.zero:
                accelerator.sync_gradients = last  # it takes the step, too
            with nullcontext() if last or self.zero else accelerator.no_sync(self.host if self.sharded else self.model):
                parts = (self.graphs or self._gradients)(self._batch(batch, place))
            for name, part in parts.items():
                total[name] = total.get(name, torch.zeros((), device=part.device)) + part / len(micro_batches)
        means = {name: float(accelerator.reduce(x, "mean")) for name, x in total.items()}
        if not all(map(_is_finite, means.values())):
            kept = (
                "there is no checkpoint yet" if self.saved is None else f"the checkpoint of step {self.saved} is kept"
            )
            raise Diverged(
                f"step {self.step + 1}: the loss is {means['loss']}; {kept}: begin anew with a smaller --lr in "
                "another --out"
            )
        if self.sharded:
            average(accelerator, self.parameters.values())
        accelerator.clip_grad_norm_(self.parameters.values(), 1.0)
        return means

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Adds a batch's part of a step's gradients. Returns: its losses, the weighted sum of them first."""
        parts = self._losses(batch)
        loss = torch.stack([self.part.stage.weight(name) * part for name, part in parts.items()]).sum()
        self.accelerator.backward(loss / self.request.accumulate)
        return {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}}

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """Of the stage, by name, unweighted."""
        stage = self.part.stage
        with autocast(self.accelerator, self.request.mixed_precision):
            if stage.transfer:
                assert self.teacher is not None
                return {"transfer": transfer_loss(self.model, self.teacher, self.layers, self.process, batch)}
            parts = losses_of(stage, self.model, self.teacher, self.layers, self.process, batch)
        if self.selection is not None:
            parts |= self.selection.losses(self.part.done(self.step))
        return parts

    def _batch(self, batch: list[int], place: int) -> Batch:
        """This process's part of a batch, the place-th of the run."""
        size, device = self.request.batch, self.accelerator.device
        first = self.accelerator.process_index * size
        places = batch[first : first + size]
        chosen = [self.samples[i] for i in places]
        levels, noises, later, told = [], [], [], []
        for i, sample in enumerate(chosen, first):
            mixed = np.random.SeedSequence([self.request.source.seed, place, i]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(mixed[0]))
            levels.append(self.process.draw(generator))
            noises.append(torch.randn(sample.latents.shape, generator=generator))
            later.append(self.process.draw_later(levels[-1], generator))
            dropout = self.request.caption_dropout
            empty = dropout > 0 and float(torch.rand((), generator=generator)) < dropout
            told.append(self.samples.without_caption(places[i - first]) if empty else sample.conditions)
        conditions = merge(told)
        conditions.tensors = {key: x.to(device) for key, x in conditions.tensors.items()}
        latents = torch.cat([sample.latents for sample in chosen]).to(device)
        ahead, there = torch.tensor(later, device=device), torch.tensor(levels, device=device)
        return Batch(latents, torch.cat(noises).to(device), there, ahead, conditions, self.kinds[places[0]])

    def save(self) -> None:
        """A checkpoint of whole values, written by the first process."""
        self.accelerator.wait_for_everyone()
        reshard(self.host)
        first = self.accelerator.is_main_process
        learned = {name: p for name, p in self.host.named_parameters() if name in self.learned}
        state = {
            "step": self.step,
            "stage": self.index,
            "scores": self.scores,
            "history": self.history,
            "parameters": gather(learned, keep=first),
            "optimizer": (all_parts if self.zero else whole_states)(self.optimizer, keep=first),
            "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),  # of fp16's gradients
        }
        if first:
            save_checkpoint(self.request.source.out, state)
            self.saved = self.step


def _is_finite(x: float) -> bool:
    return x - x == 0
