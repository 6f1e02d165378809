"""Recipes: what is minimised and what is trained, each from its paper and named after it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Weights of the losses, and what is trained at which rate where nothing else is asked for.

    flow: the pretraining objective (flow matching, or noise or v prediction). prediction: distance to the teacher's
    prediction. attention: to the teacher's attention outputs, mean over layers.
    """

    name: str
    source: str
    flow: float
    prediction: float
    attention: float
    train: str
    lr: float


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("sla", "SLA, arXiv 2509.24006, section 5: the whole model, its own objective", 1, 0, 0, "full", 1e-5),
        Recipe(
            "clear", "CLEAR, arXiv 2412.16112, eq. 5 to 8: the attention layers, with distillation", 1, 0.5, 0.5,
            "attention", 1e-4,
        ),
    )
}  # fmt: skip
