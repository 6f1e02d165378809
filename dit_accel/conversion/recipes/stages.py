"""Schedule of a recipe's stages for one run, and the parameters that each stage trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_accel.install.families import attention_groups_of
from dit_accel.install.installation import new_layer

from ..request import Request
from .lora import require_peft
from .recipe import Recipe, Stage
from .selection import default_layer_count

__all__ = ["Plan", "ScheduledStage", "check_request", "host_parameters", "plan"]


@dataclass(frozen=True)
class ScheduledStage:
    """A stage for the steps in [``first``, ``end``). scope: trained parameters, see :class:`.recipes.Stage`."""

    stage: Stage
    first: int
    end: int
    scope: str
    lr: float

    def done(self, step: int) -> float:
        """Progress of the stage: 0 at its first step, 1 at its last."""
        return (step - self.first) / max(1, self.end - self.first - 1)

    def about(self) -> dict[str, Any]:
        """The stage's entry in ``convert.json``."""
        return {
            "name": self.stage.name,
            "first_step": self.first + 1,
            "steps": self.end - self.first,
            "train": self.scope,
            "lr": self.lr,
        }

    def trains(self, host: Mapping[str, nn.Parameter], pretrained: set[str]) -> dict[str, nn.Parameter]:
        """The student's parameters that the stage trains, by name.

        Args: host: all parameters of the student. pretrained: :func:`host_parameters` of the stage's scope.
        """
        own, lora = self.scope != "adapter", self.scope in ("lora", "adapter")
        return {
            name: parameter
            for name, parameter in host.items()
            if name in pretrained or (own and ".dit_accel." in name) or (lora and ".lora_" in name)
        }


@dataclass(frozen=True)
class Plan:
    """A recipe with its scheduled stages. number: number of layers to convert if a stage selects them, else None."""

    recipe: Recipe
    stages: tuple[ScheduledStage, ...]
    number: int | None

    @property
    def needs_lora(self) -> bool:
        return any(stage.scope in ("lora", "adapter") for stage in self.stages)

    @property
    def needs_teacher(self) -> bool:
        return any(stage.needs_teacher for stage in self.recipe.stages)


def check_request(request: Request, recipe: Recipe) -> None:
    """Check the options that do not depend on the model.

    Raises: ValueError: an option is incompatible with the recipe or with another option.
    """
    if request.steps < len(recipe.stages):
        names = ", ".join(stage.name for stage in recipe.stages)
        raise ValueError(
            f"--recipe {recipe.name} has {len(recipe.stages)} stages ({names}), got --steps {request.steps}: give at "
            "least one step per stage"
        )
    if request.train is not None and recipe.fixes_train:
        raise ValueError(
            f"--recipe {recipe.name} sets what each of its stages trains: leave --train {request.train} out, or choose "
            "another recipe"
        )
    if request.lora_layers != "attention" and request.train != "lora":
        raise ValueError(f"--lora-layers {request.lora_layers} needs --train lora")
    if request.cuda_graph and recipe.selects:
        raise ValueError(f"--recipe {recipe.name} changes its losses at every step: leave --cuda-graph out")
    if request.convert_layers is not None and not recipe.selects:
        raise ValueError(
            f"--convert-layers needs --recipe linvideo, which selects layers; --recipe {recipe.name} converts all of "
            "them"
        )


def plan(request: Request, recipe: Recipe, model: nn.Module, processor: Any) -> Plan:
    """Schedule the recipe's stages, with steps, learning rates and scopes, for a model and a processor.

    ``--lr`` is the learning rate of the last stage; earlier stages keep their ratio to it. If the mechanism adds no
    parameters, the first stage of attention transfer already trains the LoRA of the second. The model is not changed.

    Raises: ValueError: a stage would train nothing, or more layers are requested than the model has.
    """
    layers = [name for group in attention_groups_of(model) for name in group.layers]
    with torch.device("meta"):
        added = new_layer(processor, model.get_submodule(layers[0]), layers[0])
    if recipe.selects and added.input_projections:
        raise ValueError(
            f"{processor.name} changes the inputs of query and key, so it cannot be mixed with dense attention as "
            f"--recipe {recipe.name} does: choose another recipe or mechanism"
        )
    last, stages, first, share = recipe.stages[-1].lr, [], 0, 0.0
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
        stages.append(ScheduledStage(stage, first, end, scope, lr))
        first = end
    found = Plan(recipe, tuple(stages), _layer_count(request, recipe, len(layers)))
    if found.needs_lora:
        require_peft()
    return found


def _layer_count(request: Request, recipe: Recipe, layers: int) -> int | None:
    """Number of layers to convert; None if the recipe does not select layers.

    Raises: ValueError: the request has more than the model.
    """
    if not recipe.selects:
        return None
    number = default_layer_count(layers) if request.convert_layers is None else request.convert_layers
    if number > layers:
        raise ValueError(
            f"--convert-layers {number}: the model has {layers} self-attention layers, give at most {layers}"
        )
    return number


def host_parameters(model: nn.Module, scope: str) -> set[str]:
    """Names of the pretrained parameters that a scope trains."""
    names = [name for name, _ in model.named_parameters()]
    if scope == "full":
        return set(names)
    layers = tuple(f"{name}." for group in attention_groups_of(model) for name in group.layers)
    return {name for name in names if name.startswith(layers)} if scope == "attention" else set()
