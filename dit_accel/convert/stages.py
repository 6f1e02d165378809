"""A recipe's stages as a run goes through them, and what of a model each of them trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..families import attention_groups_of
from ..install import new_layer
from .lora import require_peft
from .recipes import Recipe, Stage
from .request import Request
from .selection import usual_number
from .zero import is_zero

__all__ = ["Part", "Plan", "check_request", "host_parameters", "plan"]


@dataclass(frozen=True)
class Part:
    """A stage from step ``first`` to before step ``end``; scope: what it trains, as :class:`.recipes.Stage` has it."""

    stage: Stage
    first: int
    end: int
    scope: str
    lr: float

    def done(self, step: int) -> float:
        """From 0 at the first step to 1 at the last."""
        return (step - self.first) / max(1, self.end - self.first - 1)

    def about(self) -> dict[str, Any]:
        """For ``convert.json``."""
        return {
            "name": self.stage.name,
            "first_step": self.first + 1,
            "steps": self.end - self.first,
            "train": self.scope,
            "lr": self.lr,
        }

    def trains(self, host: Mapping[str, nn.Parameter], pretrained: set[str]) -> dict[str, nn.Parameter]:
        """Of a student's parameters those that it trains; pretrained: :func:`host_parameters` of its scope."""
        own, lora = self.scope != "adapter", self.scope in ("lora", "adapter")
        return {
            name: parameter
            for name, parameter in host.items()
            if name in pretrained or (own and ".dit_accel." in name) or (lora and ".lora_" in name)
        }


@dataclass(frozen=True)
class Plan:
    """parts: one a stage. number: of layers that will be converted, where a stage selects them."""

    recipe: Recipe
    parts: tuple[Part, ...]
    number: int | None

    @property
    def needs_lora(self) -> bool:
        return any(part.scope in ("lora", "adapter") for part in self.parts)

    @property
    def needs_teacher(self) -> bool:
        return any(stage.needs_teacher for stage in self.recipe.stages)


def check_request(request: Request, recipe: Recipe) -> None:
    """What can be told without the model.

    Raises: ValueError: options that do not go together with the recipe.
    """
    if request.steps < len(recipe.stages):
        names = ", ".join(stage.name for stage in recipe.stages)
        raise ValueError(
            f"--recipe {recipe.name} has {len(recipe.stages)} stages ({names}), and --steps {request.steps} is not "
            "even one step for each: give more"
        )
    if request.train is not None and recipe.fixes_train:
        raise ValueError(
            f"--recipe {recipe.name} says itself what each stage trains, so --train {request.train} cannot be given: "
            "leave it out, or choose another recipe"
        )
    if request.lora_layers != "attention" and request.train != "lora":
        raise ValueError(f"--lora-layers {request.lora_layers} is for --train lora")
    if request.cuda_graph and recipe.selects:
        raise ValueError(f"--recipe {recipe.name} changes its losses from step to step, so leave --cuda-graph out")
    if request.convert_layers is not None and not recipe.selects:
        raise ValueError(
            f"--convert-layers is for --recipe linvideo, which chooses layers; --recipe {recipe.name} converts all"
        )


def check_graph(request: Request, accelerator: Accelerator) -> None:
    """What a captured step does not go together with.

    Raises: ValueError: no CUDA GPU, several processes, or something that changes from step to step.
    """
    if not request.cuda_graph:
        return
    if accelerator.device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a CUDA GPU; accelerate found {accelerator.device}: leave it out")
    if (
        accelerator.num_processes > 1
        or is_zero(accelerator)
        or request.gradient_checkpointing
        or request.mixed_precision == "fp16"
    ):
        raise ValueError(
            "--cuda-graph is for one process without DeepSpeed, --mixed-precision no or bf16 and no "
            "--gradient-checkpointing: such a step cannot be captured, leave one of them out"
        )


def plan(request: Request, recipe: Recipe, model: nn.Module, processor: Any) -> Plan:
    """The stages with their steps, rates and scopes for a model and a mechanism; nothing is changed.

    ``--lr`` is the rate of the last stage; those before keep their proportion to it. Where the mechanism adds no
    parameters, attention transfer trains in its first stage the LoRA of the second already.

    Raises: ValueError: a stage would train nothing, or layers are to be chosen that are not there.
    """
    layers = [name for group in attention_groups_of(model) for name in group.layers]
    with torch.device("meta"):
        added = new_layer(processor, model.get_submodule(layers[0]), layers[0])
    if recipe.selects and added.input_projections:
        raise ValueError(
            f"{processor.name} changes what query and key are made from, so its attention cannot be mixed with the "
            f"dense one as --recipe {recipe.name} does: choose another recipe or mechanism"
        )
    last, parts, first, share = recipe.stages[-1].lr, [], 0, 0.0
    for stage in recipe.stages:
        share += stage.share
        scope = request.train or stage.train
        lr = stage.lr if request.lr is None else request.lr * (stage.lr / last)
        if scope == "new" and not any(True for _ in added.parameters()):
            if not recipe.fixes_train:
                raise ValueError(
                    f"{processor.name} with these options adds no parameters, so --train new trains nothing: use "
                    "--train attention, lora or full"
                )
            scope, lr = "adapter", request.lr or last
        end = request.steps if stage is recipe.stages[-1] else max(first + 1, int(share * request.steps))
        parts.append(Part(stage, first, end, scope, lr))
        first = end
    found = Plan(recipe, tuple(parts), _number(request, recipe, len(layers)))
    if found.needs_lora:
        require_peft()
    return found


def _number(request: Request, recipe: Recipe, layers: int) -> int | None:
    if not recipe.selects:
        return None
    number = usual_number(layers) if request.convert_layers is None else request.convert_layers
    if number > layers:
        raise ValueError(f"--convert-layers {number}: the model has {layers} self-attention layers; give at most those")
    return number


def host_parameters(model: nn.Module, scope: str) -> set[str]:
    """Names of the pretrained parameters that a scope trains."""
    names = [name for name, _ in model.named_parameters()]
    if scope == "full":
        return set(names)
    layers = tuple(f"{name}." for group in attention_groups_of(model) for name in group.layers)
    return {name for name in names if name.startswith(layers)} if scope == "attention" else set()
