"""Training recipes from papers: losses, trained parameters and learning rates per stage.

Deviations from the papers:

- LinVideo was known only from its abstract and secondary notes. The learning rate, training of the whole model and
  the initial scores are this project's. Selection ends half way; the paper trains the scores to the last step.
- LoLCATs: the learning rates are those of the authors' configurations, which also use LoRA of rank 8.
- LiT reinitializes the projections of its attention; here they are inherited from the pretrained model. The learning
  rate is that of the authors' text-to-image configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["RECIPES", "Recipe", "Stage", "parse_weight", "reweighted"]

WEIGHTS = ("flow", "prediction", "variance", "attention")


@dataclass(frozen=True)
class Stage:
    """A stage of a recipe: default trained parameters and learning rate, share of the steps, and loss weights.

    Attributes:
        train: "full", "attention", "new" or "lora" as in ``--train``, or "adapter": LoRA without the mechanism's own
            parameters.
        lr: default learning rate.
        share: share of all steps.
        flow: weight of the pretraining objective (flow matching, noise or v prediction).
        prediction: weight of the distance to the teacher's prediction.
        variance: weight of the distance to the teacher's predicted variance, for models that predict one.
        attention: weight of the distance to the teacher's attention outputs, mean over layers.
        transfer: weight of the same distance for layers that get the teacher's inputs (:mod:`.transfer`); the only
            loss of its stage.
        matching: weight of the distance between distributions along the trajectory (:mod:`.matching`).
        selection: weight of the two losses that select layers (:mod:`.selection`).
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

    def weight(self, loss: str) -> float:
        """Weight of a loss by name; "count" and "binary" of the selection share one weight."""
        return float(getattr(self, "selection" if loss in ("count", "binary") else loss))


@dataclass(frozen=True)
class Recipe:
    """A named sequence of training stages. source: the paper, and what is trained."""

    name: str
    source: str
    stages: tuple[Stage, ...]

    @property
    def selects(self) -> bool:
        return any(stage.selection for stage in self.stages)

    @property
    def fixes_train(self) -> bool:
        """Whether the recipe determines the trained parameters, since they differ between its stages."""
        return len({stage.train for stage in self.stages}) > 1


def parse_weight(text: str) -> tuple[str, float]:
    """Parse ``NAME=WEIGHT``. Raises: ValueError: an unknown loss, or the weight is not a number of at least 0."""
    name, _, number = text.partition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if name not in WEIGHTS or not 0 <= weight < math.inf:
        names = ", ".join(WEIGHTS)
        raise ValueError(f"--loss-weight takes NAME=WEIGHT with NAME one of {names} and WEIGHT >= 0, got {text!r}")
    return name, weight


def reweighted(recipe: Recipe, weights: Mapping[str, float]) -> Recipe:
    """Copy of the recipe with these loss weights.

    Raises: ValueError: the recipe has several stages, or no loss would be left.
    """
    if not weights:
        return recipe
    if len(recipe.stages) > 1:
        raise ValueError(
            f"--recipe {recipe.name} sets the losses of each of its stages: leave --loss-weight out, or choose another "
            "recipe"
        )
    stage = replace(recipe.stages[0], **weights)  # type: ignore[arg-type]
    if not any(stage.weight(name) for name in ("flow", "prediction", "attention")):
        raise ValueError("--loss-weight leaves no loss to train with: set flow, prediction or attention above 0")
    changes = ", ".join(f"{name} {value:g}" for name, value in weights.items())
    return replace(recipe, source=f"{recipe.source}; loss weights: {changes}", stages=(stage,))


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
