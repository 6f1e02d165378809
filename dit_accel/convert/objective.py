"""What a step minimises: the pretraining objective, and distances to the teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..install import unwrap
from .capture import Conditions
from .noise import NoiseProcess
from .recipes import Recipe

__all__ = ["Losses", "attention_outputs", "copy_teacher", "losses_of"]


@dataclass
class Losses:
    """Of a batch: the sum that is minimised, and its parts (unweighted) by name."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def copy_teacher(model: nn.Module, trained: set[str]) -> nn.Module:
    """The model as it is now, frozen; what is not going to be trained is shared with it, not copied."""
    shared = {id(p): p for name, p in model.named_parameters() if name not in trained}
    teacher = copy.deepcopy(model, shared)
    return teacher.eval()


@contextmanager
def attention_outputs(model: nn.Module, layers: list[str]) -> Iterator[dict[str, Tensor]]:
    """What the attention modules of these names give, while inside; of several tensors the first, the grid's."""
    found: dict[str, Tensor] = {}

    def note(name: str, output: Any) -> None:
        found.setdefault(name, output[0] if isinstance(output, tuple) else output)

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: note(name, out))
        for name in layers
    ]  # fmt: skip
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def losses_of(
    recipe: Recipe,
    model: nn.Module,
    teacher: nn.Module | None,
    layers: list[str],
    process: NoiseProcess,
    latents: Tensor,
    noise: Tensor,
    levels: Tensor,
    conditions: Conditions,
) -> Losses:
    """The recipe's losses of one batch.

    Args:
        model, teacher: the student, and what it is distilled from where the recipe has weights for that.
        layers: names of the attention modules that were converted.
        latents, noise: (B, …). levels: (B,) of noise. conditions: of the batch, on its device.
    """
    noisy, target = process.mix(latents, noise, levels)
    arguments = conditions.arguments(noisy, process.timestep(levels))
    with attention_outputs(unwrap(model), layers if recipe.attention else []) as ours:
        prediction = model(**arguments)[0]
    parts = {"flow": F.mse_loss(prediction.float(), target.float())}
    if teacher is not None:
        with torch.no_grad(), attention_outputs(teacher, layers if recipe.attention else []) as theirs:
            wanted = teacher(**arguments)[0]
        if recipe.prediction:
            parts["prediction"] = F.mse_loss(prediction.float(), wanted.float())
        if recipe.attention:
            each = [F.mse_loss(ours[name].float(), theirs[name].float()) for name in layers]
            parts["attention"] = torch.stack(each).mean()
    weights = {"flow": recipe.flow, "prediction": recipe.prediction, "attention": recipe.attention}
    total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
    return Losses(total, parts)
