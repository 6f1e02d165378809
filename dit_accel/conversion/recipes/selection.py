"""Selective transfer: learned selection of the layers to convert. [LinVideo, arXiv 2510.08318, eq. 8 to 10]"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel.install.intercept import MechanismLayer

__all__ = ["Selection", "default_layer_count"]

START = 0.1  # initial score of every layer: nearly dense, but not 0, where the binary loss would keep it
ALPHA = (20.0, 2.0)  # from the first step to the last [LinVideo, table I]


def default_layer_count(layers: int) -> int:
    """Default number of layers to convert: 16 of 30 and 22 of 40, the paper's numbers for Wan."""
    return math.ceil(8 * layers / 15)


class Selection:
    """Mixture of new and dense attention in every layer, ``r · new + (1 - r) · dense``, with one trained score r each.

    r weights the new attention; the paper's r weights the dense one, so it is 1 - r here. Both attentions have the
    same query, key and value and are mixed before the output projection.

    Args:
        layers: candidate layers; each gets the parameter ``score``, () float32, on ``device``.
        number: number of layers to select.
    """

    def __init__(self, layers: Mapping[str, MechanismLayer], number: int, device: torch.device) -> None:
        self.layers, self.number = dict(layers), number
        self.handles = []
        for layer in self.layers.values():
            layer.register_parameter("score", nn.Parameter(torch.tensor(START, device=device)))
            self.handles.append(layer.register_forward_hook(_mix, with_kwargs=True))

    def scores(self) -> dict[str, float]:
        """Score of each layer by name."""
        return dict(zip(self.layers, self._stacked().tolist(), strict=True))

    def _stacked(self) -> Tensor:
        return torch.stack([layer.get_parameter("score") for layer in self.layers.values()])

    @torch.no_grad()
    def restore(self, scores: Mapping[str, float]) -> None:
        """Set the scores to a result of :meth:`scores`."""
        for name, layer in self.layers.items():
            layer.get_parameter("score").fill_(scores[name])

    def losses(self, done: float) -> dict[str, Tensor]:
        """Losses that pull the scores' sum to ``number`` and each score to 0 or 1; () float32 each.

        count: ``(Σ r - number)²``. The paper's eq. 9 rounds r; its gradient is not documented, and with a
        straight-through gradient all scores ended near 1/2 if the layers' losses differed little.
        binary: ``Σ 1 - |2r - 1|^α``, eq. 10; α falls linearly from 20, where the loss is flat except near 0 and 1,
        to 2.

        Args: done: progress of the stage, 0 at the first step and 1 at the last.
        """
        scores = self._stacked()
        alpha = ALPHA[0] + (ALPHA[1] - ALPHA[0]) * done
        return {
            "count": (scores.sum() - self.number).square(),
            "binary": (1 - (2 * scores - 1).abs().pow(alpha)).sum(),
        }

    def optimizer_group(self, steps: int) -> dict[str, Any]:
        """AdamW parameter group of the scores for a stage of ``steps`` steps.

        The learning rate lets a score cross [0, 1] about ten times; there is no weight decay. betas are short because
        the count loss is large at first and would otherwise dominate the second moment when the binary loss matters.
        """
        scores = [layer.get_parameter("score") for layer in self.layers.values()]
        return {"params": scores, "lr": min(0.1, 10 / steps), "weight_decay": 0.0, "betas": (0.9, 0.95)}

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp the scores to [0, 1]; called after each optimizer step."""
        for layer in self.layers.values():
            layer.get_parameter("score").clamp_(0, 1)

    def selected(self) -> list[str]:
        """Names of the ``number`` layers with the highest scores, in model order; ties go to the earlier layer."""
        scores = self.scores()
        best = sorted(self.layers, key=lambda name: -scores[name])[: self.number]
        return [name for name in self.layers if name in best]

    def remove(self) -> None:
        """Remove the hooks and the score parameters."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers.values():
            del layer.score


def _mix(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor) -> Tensor:
    score = layer.get_parameter("score")
    return score * new + (1 - score) * F.scaled_dot_product_attention(*args, **kwargs)
