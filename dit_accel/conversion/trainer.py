"""Training of the student: stages, steps, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ..common.errors import BadInput, Diverged
from ..common.signals import Stopped, defer_interrupts, ignore_interrupts, record_interrupts
from ..install.installation import installation_of, installed_layers, keep_layers, set_by_layer
from ..mechanisms.attn_spec import ByLayer
from .checkpoint import check_steps, load_checkpoint, save_checkpoint
from .data.samples import Samples, batches
from .graphed import GraphedGradients
from .parallel.protocol import Parallel
from .recipes.capture import merge
from .recipes.lora import add_lora
from .recipes.noise import NoiseProcess
from .recipes.objective import Batch, losses_of, transfer_loss
from .recipes.selection import Selection
from .recipes.stages import Plan, ScheduledStage, host_parameters
from .recipes.transfer import TeacherForced
from .request import Request

__all__ = ["Trainer"]


_LOG_INTERVAL = 20.0  # seconds between printed lines if the output is not a terminal, which shows no progress bar


class Trainer:
    """Training of a student; all random numbers are functions of the seed and the step, so a resumed run is exact."""

    def __init__(
        self, request: Request, plan: Plan, parallel: Parallel, pipe: Any, host: nn.Module, choices: ByLayer,
        process: NoiseProcess, samples: Samples,
    ) -> None:  # fmt: skip
        self.request, self.plan, self.parallel, self.process = request, plan, parallel, process
        self.accelerator = parallel.accelerator
        self.samples, self.kinds, self.host = samples, samples.kinds, host
        host.requires_grad_(False)
        parallel.place(host)
        self.pretrained = {stage.scope: host_parameters(host, stage.scope) for stage in plan.stages}
        trained = set().union(*self.pretrained.values())
        self.teacher = parallel.new_teacher(host, trained) if plan.needs_teacher else None
        set_by_layer(pipe, choices)
        installation = installation_of(host)
        assert installation is not None
        for name in sorted(trained):  # they are then saved, and a reset restores the pretrained values
            installation.overwritten[name] = host.get_parameter(name).detach().to("cpu", copy=True)
        self.layers = list(installed_layers(host))
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            # Blocks share code, and per-layer options need one graph each for student and teacher.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 4 * len(self.layers))
        if plan.needs_lora:
            add_lora(host, self.layers, request.lora_layers, request.rank, request.source.seed)
        if request.gradient_checkpointing:
            getattr(host, "enable_gradient_checkpointing")()  # noqa: B009 (a method of diffusers models)
        host.train()
        parallel.shard(host, self.layers if any(scheduled.stage.transfer for scheduled in plan.stages) else ())
        self.step, self.history, self.saved = 0, [], None
        self.model, self.selection, self.scores, self.learned, self.graphs = None, None, None, set(), None
        self._enter(0)

    step: int
    history: list[dict[str, float]]
    saved: int | None  # step of the last checkpoint
    index: int  # index of the current stage
    model: Any  # the module that the stage calls, wrapped by accelerate
    optimizer: Any
    rates: list[float]  # learning rates of its groups after the warm-up
    parameters: dict[str, nn.Parameter]  # parameters that the stage trains
    learned: set[str]  # names of all parameters trained by this and earlier stages
    selection: Selection | None  # set in a stage that selects layers
    graphs: GraphedGradients | None  # CUDA graphs of the stage, with --cuda-graph
    scores: dict[str, float] | None  # scores of the finished selection

    @property
    def current(self) -> ScheduledStage:
        """The current stage."""
        return self.plan.stages[self.index]

    def _enter(self, index: int) -> None:
        """End the previous stage and set up model, parameters and optimizer of this one."""
        self.parallel.free_gathered(self.host)
        if self.model is not None:
            self.parallel.finish_stage(self.model)
            self.model = self.optimizer = None
            self.accelerator.free_memory()
        if self.selection is not None:
            self._select(self.selection)
        self.index = index
        if self.current.stage.selection:
            assert self.plan.number is not None
            self.selection = Selection(installed_layers(self.host), self.plan.number, self.accelerator.device)
        self.host.requires_grad_(False)
        self.parameters = self.current.trains(dict(self.host.named_parameters()), self.pretrained[self.current.scope])
        self.learned |= set(self.parameters)
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        called = TeacherForced(self.host, self.layers) if self.current.stage.transfer else self.host
        self.model, self.optimizer = self.parallel.prepare(self.host, called, self._new_optimizer())
        if self.request.cuda_graph:
            self.graphs = GraphedGradients(self._gradients, self.parameters.values())

    def _select(self, selection: Selection) -> None:
        """Keep the selected layers converted and reset all others."""
        self.layers, self.scores, self.selection = selection.selected(), selection.scores(), None
        selection.remove()
        keep_layers(self.host, self.layers)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """AdamW, with a separate parameter group for the scores of a selection."""
        groups: list[dict[str, Any]] = [{"params": list(self.parameters.values())}]
        if self.selection is not None:
            groups.append(self.selection.optimizer_group(self.current.end - self.current.first))
            ours = set(map(id, groups[1]["params"]))
            groups[0]["params"] = [p for p in self.parameters.values() if id(p) not in ours]
        optimizer = torch.optim.AdamW(groups, lr=self.current.lr)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def resume(self, console: Console) -> None:
        """Resume from the checkpoint, if there is one.

        Raises: BadInput: the checkpoint cannot be read, or belongs to another run.
        """
        out, first = self.request.source.out, self.accelerator.is_main_process
        try:
            state = load_checkpoint(
                out, self.parallel.collective, lambda text: console.print(text, soft_wrap=True, highlight=False)
            )
            if state is not None:
                check_steps(out, state["step"], self.request.steps)
        except ValueError as error:
            raise BadInput(str(error)) from error
        if state is None:
            return
        self.parallel.check_optimizer_state(state["optimizer"], out)
        try:
            self._enter_stage_of(state)
        except (LookupError, TypeError, ValueError) as error:
            raise BadInput(
                f"the checkpoint in {out} is of another model or other options ({error}): choose another --out, or "
                "remove the checkpoint to start over"
            ) from error
        named = dict(self.host.named_parameters())
        with torch.no_grad():
            for name, value in state["parameters"].items():
                named[name].copy_(self.parallel.local(value, named[name]))
        self.parallel.load_optimizer_state(self.optimizer, state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.saved = state["step"], state["history"], state["step"]
        if first:
            console.print(f"Resuming from step {self.step}", highlight=False)

    def _enter_stage_of(self, state: dict[str, Any]) -> None:
        """Enter the stage of a checkpoint.

        No values are loaded here.

        Raises: ValueError, LookupError, TypeError: the checkpoint has other stages or parameters.
        """
        step, stage, stages = state["step"], state["stage"], self.plan.stages
        if not (0 <= stage < len(stages) and stages[stage].first <= step <= stages[stage].end):
            raise ValueError(f"its step {step} is in stage {stage + 1}, which does not fit the {len(stages)} here")
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
        """Do all remaining steps. Checkpoints are saved every ``save_every`` steps, at the end and when interrupted.

        Args: after: called after each step with its number.
        """
        try:
            with record_interrupts() if self.parallel.stops_together else nullcontext(list[int]()) as signals:
                self._steps(progress, after, signals)
        except KeyboardInterrupt:
            with ignore_interrupts():
                self.save()
            raise
        self.save()

    def _steps(self, progress: Progress, after: Callable[[int], None], signals: list[int]) -> None:
        """Run the training loop.

        Args: signals: recorded interrupts, checked after each step; without recording an interrupt aborts the step.
        """
        request, world = self.request, self.accelerator.num_processes
        order = batches(self.kinds, request.batch * world, request.source.seed)
        drawn = islice(order, self.step * request.accumulate, None)
        first, began = self.step, time.perf_counter()
        logged = began
        task = progress.add_task(self._stage_label(), total=request.steps, completed=self.step)
        together = self.parallel.stops_together  # if so, interrupts are recorded instead of raised
        uninterrupted = nullcontext if together else defer_interrupts
        while self.step < request.steps:
            if self.step == self.current.end:
                with uninterrupted():
                    self._enter(self.index + 1)
                progress.update(task, description=self._stage_label())
            losses = self._accumulate(list(islice(drawn, request.accumulate)))
            with uninterrupted():  # a checkpoint must hold complete steps
                self.optimizer.step()
                if self.selection is not None:
                    self.selection.clamp()
                self.history.append(losses)
                self.step += 1
            self.optimizer.zero_grad(set_to_none=self.graphs is None)
            self.accelerator.log(losses, step=self.step)
            text = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
            text += f", {(self.step - first) / (time.perf_counter() - began):.2f} steps/s"
            progress.update(task, advance=1, figures=text)
            if not progress.console.is_terminal and time.perf_counter() - logged >= _LOG_INTERVAL:
                logged = time.perf_counter()
                progress.console.print(f"step {self.step} of {request.steps}: {text}", highlight=False, soft_wrap=True)
            if self.step % request.save_every == 0 and self.step < request.steps:
                self.save()
            after(self.step)
            if together:
                self._stop_together(signals)

    def _stop_together(self, signals: list[int]) -> None:
        """Stop all processes after the same step. Raises: Stopped: a process has recorded an interrupt."""
        own = torch.tensor(signals[0] if signals else 0, device=self.accelerator.device)
        number = int(self.accelerator.gather(own).max())
        if number:
            raise Stopped(number)

    def _stage_label(self) -> str:
        """Name of the stage for the progress bar."""
        position = f" ({self.index + 1} of {len(self.plan.stages)})" if len(self.plan.stages) > 1 else ""
        return self.current.stage.name + position

    def _accumulate(self, micro_batches: list[list[int]]) -> dict[str, float]:
        """Accumulate the gradients of one step over its micro-batches, and clip them.

        Returns: losses, averaged over micro-batches and processes.
        Raises: Diverged: a loss is NaN or infinite.
        """
        accelerator = self.accelerator
        ramp = min(1.0, (self.step - self.current.first + 1) / max(1, self.request.warmup))
        if self.request.schedule == "cosine":
            ramp *= 0.5 * (1 + math.cos(math.pi * self.current.done(self.step)))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * ramp
        total: dict[str, Tensor] = {}
        for i, batch in enumerate(micro_batches):
            number = self.step * len(micro_batches) + i
            last = i + 1 == len(micro_batches)
            with self.parallel.micro_batch(self.host, self.model, last):
                losses = (self.graphs or self._gradients)(self._batch(batch, number))
            for name, loss in losses.items():
                total[name] = total.get(name, torch.zeros((), device=loss.device)) + loss / len(micro_batches)
        means = {name: float(accelerator.reduce(x, "mean")) for name, x in total.items()}
        if not all(map(_is_finite, means.values())):
            kept = (
                "there is no checkpoint yet" if self.saved is None else f"the checkpoint of step {self.saved} is kept"
            )
            raise Diverged(
                f"step {self.step + 1}: the loss is {means['loss']}; {kept}. Start over with a smaller --lr and "
                "another --out"
            )
        self.parallel.clip_gradients(self.parameters.values())
        return means

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Add the gradients of one batch. Returns: "loss", the weighted sum, and the unweighted losses by name."""
        losses = self._losses(batch)
        loss = torch.stack([self.current.stage.weight(name) * x for name, x in losses.items()]).sum()
        self.accelerator.backward(loss / self.request.accumulate)
        return {"loss": loss.detach(), **{name: x.detach() for name, x in losses.items()}}

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """Unweighted losses of the current stage by name."""
        stage = self.current.stage
        with self.parallel.autocast():
            if stage.transfer:
                assert self.teacher is not None
                return {"transfer": transfer_loss(self.model, self.teacher, self.layers, self.process, batch)}
            losses = losses_of(stage, self.model, self.teacher, self.layers, self.process, batch)
        if self.selection is not None:
            losses |= self.selection.losses(self.current.done(self.step))
        return losses

    def _batch(self, batch: list[int], number: int) -> Batch:
        """This process's share of a batch.

        Args: batch: sample indices of all processes. number: number of the batch in the run.
        """
        size, device = self.request.batch, self.accelerator.device
        first = self.accelerator.process_index * size
        indices = batch[first : first + size]
        chosen = [self.samples[i] for i in indices]
        levels, noises, later, conditions_each = [], [], [], []
        for i, sample in enumerate(chosen, first):
            mixed = np.random.SeedSequence([self.request.source.seed, number, i]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(mixed[0]))
            levels.append(self.process.draw(generator))
            noises.append(torch.randn(sample.latents.shape, generator=generator))
            later.append(self.process.draw_later(levels[-1], generator))
            dropout = self.request.caption_dropout
            empty = dropout > 0 and float(torch.rand((), generator=generator)) < dropout
            conditions_each.append(self.samples.without_caption(indices[i - first]) if empty else sample.conditions)
        conditions = merge(conditions_each)
        conditions.tensors = {key: x.to(device) for key, x in conditions.tensors.items()}
        latents = torch.cat([sample.latents for sample in chosen]).to(device)
        later_level, level = torch.tensor(later, device=device), torch.tensor(levels, device=device)
        return Batch(latents, torch.cat(noises).to(device), level, later_level, conditions, self.kinds[indices[0]])

    def save(self) -> None:
        """Save a checkpoint of full tensors; the main process writes it."""
        self.accelerator.wait_for_everyone()
        self.parallel.free_gathered(self.host)
        first = self.accelerator.is_main_process
        learned = {name: p for name, p in self.host.named_parameters() if name in self.learned}
        state = {
            "step": self.step,
            "stage": self.index,
            "scores": self.scores,
            "history": self.history,
            "parameters": self.parallel.gather(learned, keep=first),
            "optimizer": self.parallel.optimizer_state(self.optimizer, keep=first),
            "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),  # gradient scaler of fp16
        }
        if first:
            save_checkpoint(self.request.source.out, state)
            self.saved = self.step


def _is_finite(x: float) -> bool:
    return x - x == 0
