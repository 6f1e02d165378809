"""Recipes: what is minimised and what is trained, in which stages, each from its paper and named after it.

What is not the papers': LinVideo, known here from its abstract and others' notes, has its rate, the training of the
whole model and the start of its scores from us; its selection ends half way, while the paper trains scores to the last
step. LoLCATs' rates are those of the authors' configurations, which also have LoRA of rank 8. LiT draws the projections
of its attention anew; ours are the host's, and inherited; its rate is that of the authors' text-to-image configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["RECIPES", "Recipe", "Stage", "parse_weight", "reweighted"]

WEIGHTS = ("flow", "prediction", "variance", "attention")


@dataclass(frozen=True)
class Stage:
    """A part of the steps: weights of the losses, and what is trained at which rate where nothing else is asked for.

    train: "full", "attention", "new" or "lora" as ``--train`` has them, or "adapter": LoRA without the mechanism's own
    parameters. share: of the steps.

    flow: the pretraining objective (flow matching, or noise or v prediction). prediction: distance to the teacher's
    prediction. variance: to its predicted variance, of models that have one. attention: to its attention outputs, mean
    over layers. transfer: the same of layers that are fed what the teacher's are (:mod:`.transfer`), alone in its
    stage. matching: of the distributions along the trajectory (:mod:`.matching`). selection: of the two losses by which
    layers are chosen (:mod:`.selection`).
    """

    name: str
    train: str
    lr: float
    share: float = 1.0
    flow: float = 0
    prediction: float = 0
    variance: float = 0
    attention: float = 0
    transfer: float = 0
    matching: float = 0
    selection: float = 0

    @property
    def needs_teacher(self) -> bool:
        return bool(self.prediction or self.variance or self.attention or self.transfer or self.matching)

    def weight(self, part: str) -> float:
        """Of a loss by its name; the selection's two, "count" and "binary", share one."""
        return float(getattr(self, "selection" if part in ("count", "binary") else part))


@dataclass(frozen=True)
class Recipe:
    """Stages, one after the other."""

    name: str
    source: str
    stages: tuple[Stage, ...]

    @property
    def selects(self) -> bool:
        return any(stage.selection for stage in self.stages)

    @property
    def fixes_train(self) -> bool:
        """Whether what is trained belongs to the recipe, since it differs between stages."""
        return len({stage.train for stage in self.stages}) > 1


def parse_weight(text: str) -> tuple[str, float]:
    """Of ``NAME=WEIGHT``. Raises: ValueError: it is not so, or the weight is below 0."""
    name, _, number = text.partition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if name not in WEIGHTS or not 0 <= weight < math.inf:
        names = ", ".join(WEIGHTS)
        raise ValueError(f"--loss-weight takes one of {names} with a number from 0, as prediction=1, got {text!r}")
    return name, weight


def reweighted(recipe: Recipe, weights: Mapping[str, float]) -> Recipe:
    """The recipe with other weights of these losses.

    Raises: ValueError: a recipe of several stages, or no loss would be left.
    """
    if not weights:
        return recipe
    if len(recipe.stages) > 1:
        raise ValueError(
            f"--recipe {recipe.name} has stages with losses of their own, so --loss-weight cannot be given: leave it "
            "out, or choose another recipe"
        )
    stage = replace(recipe.stages[0], **weights)  # type: ignore[arg-type]
    if not any(stage.weight(name) for name in ("flow", "prediction", "attention")):
        raise ValueError("--loss-weight leaves no loss to train with: flow, prediction or attention must be above 0")
    told = ", ".join(f"{name} {value:g}" for name, value in weights.items())
    return replace(recipe, source=f"{recipe.source}; weights of losses: {told}", stages=(stage,))


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "sla", "SLA, arXiv 2509.24006, section 5: the whole model, its own objective",
            (Stage("training", "full", 1e-5, flow=1),),
        ),
        Recipe(
            "clear", "CLEAR, arXiv 2412.16112, eq. 5 to 8: the attention layers, with distillation",
            (Stage("training", "attention", 1e-4, flow=1, prediction=0.5, attention=0.5),),
        ),
        Recipe(
            "attention-transfer", "LoLCATs, arXiv 2410.10254: attention transfer, then LoRA; two epochs each",
            (
                Stage("transfer", "new", 1e-2, share=0.5, transfer=1),
                Stage("LoRA", "adapter", 1e-4, share=0.5, flow=1),
            ),
        ),
        Recipe(
            "linvideo", "LinVideo, arXiv 2510.08318, eq. 8 to 14: selective transfer, anytime distribution matching",
            (
                Stage("selection", "full", 1e-5, share=0.5, matching=1, selection=0.01),
                Stage("matching", "full", 1e-5, share=0.5, matching=1),
            ),
        ),
        Recipe(
            "lit", "LiT, arXiv 2501.12976, table 4: inherited weights, the whole model, hybrid distillation",
            (Stage("training", "full", 2e-5, flow=1, prediction=0.5, variance=0.05),),
        ),
    )
}  # fmt: skip
