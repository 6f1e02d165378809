"""Selective transfer: which layers are converted is learned. [LinVideo, arXiv 2510.08318, eq. 8 to 10]"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..intercept import MechanismLayer

__all__ = ["Selection", "usual_number"]

START = 0.1  # every layer's score at first: nearly dense, and off 0, where the binary loss would hold it
ALPHA = (20.0, 2.0)  # from the first step to the last [LinVideo, table I]


def usual_number(layers: int) -> int:
    """So many layers are converted where nothing is asked for: 16 of 30 and 22 of 40, as the paper does for Wan."""
    return math.ceil(8 * layers / 15)


class Selection:
    """While it stands, every layer gives ``r · new + (1 - r) · dense``, with a score r of its own that is trained.

    The paper's r is that of the dense attention, ours that of the new: 1 - r of the paper's. Both are of the same
    query, key and value, before the output projection.

    Args:
        layers: those to choose from; each gets the parameter ``score``, () float32, on ``device``.
        number: so many will be chosen.
    """

    def __init__(self, layers: Mapping[str, MechanismLayer], number: int, device: torch.device) -> None:
        self.layers, self.number = dict(layers), number
        self.handles = []
        for layer in self.layers.values():
            layer.register_parameter("score", nn.Parameter(torch.tensor(START, device=device)))
            self.handles.append(layer.register_forward_hook(_mix, with_kwargs=True))

    def scores(self) -> dict[str, float]:
        return dict(zip(self.layers, self._stacked().tolist(), strict=True))

    def _stacked(self) -> Tensor:
        return torch.stack([layer.get_parameter("score") for layer in self.layers.values()])

    @torch.no_grad()
    def restore(self, scores: Mapping[str, float]) -> None:
        """Set the scores to what :meth:`scores` gave."""
        for name, layer in self.layers.items():
            layer.get_parameter("score").fill_(scores[name])

    def losses(self, done: float) -> dict[str, Tensor]:
        """What pulls the scores to the wanted number, and to 0 or 1; () float32 each.

        count: ``(Σ r - number)²``; the paper's eq. 9 rounds r in it, and no source at hand tells what gradient goes
        through that: with the rounding's left out, scores ended near 1/2, all alike, where losses differ little between
        layers. binary: ``Σ 1 - |2r - 1|^α``, eq. 10; α falls linearly from 20, where all but the ends is flat, to 2.
        done: 0 at the first step, 1 at the last.
        """
        scores = self._stacked()
        alpha = ALPHA[0] + (ALPHA[1] - ALPHA[0]) * done
        return {
            "count": (scores.sum() - self.number).square(),
            "binary": (1 - (2 * scores - 1).abs().pow(alpha)).sum(),
        }

    def optimizer_group(self, steps: int) -> dict[str, Any]:
        """Of AdamW, for so many steps: scores have [0, 1] to cross some ten times and not to decay. Their short memory
        forgets the strong pull to the wanted number at first, beside which the later one to 0 or 1 would be nothing."""
        scores = [layer.get_parameter("score") for layer in self.layers.values()]
        return {"params": scores, "lr": min(0.1, 10 / steps), "weight_decay": 0.0, "betas": (0.9, 0.95)}

    @torch.no_grad()
    def clamp(self) -> None:
        """After a step, scores are in [0, 1] again."""
        for layer in self.layers.values():
            layer.get_parameter("score").clamp_(0, 1)

    def chosen(self) -> list[str]:
        """The layers with the highest scores, in the order of the model; of equal ones the earlier."""
        scores = self.scores()
        best = sorted(self.layers, key=lambda name: -scores[name])[: self.number]
        return [name for name in self.layers if name in best]

    def remove(self) -> None:
        """No mixing and no scores any more."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers.values():
            del layer.score


def _mix(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor) -> Tensor:
    score = layer.get_parameter("score")
    return score * new + (1 - score) * F.scaled_dot_product_attention(*args, **kwargs)
