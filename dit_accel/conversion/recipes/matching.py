"""Anytime distribution matching (ADM). [LinVideo, arXiv 2510.08318, eq. 11 to 13]"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .capture import Conditions
from .noise import NoiseProcess

__all__ = ["matching_loss"]


def matching_loss(
    student: nn.Module,
    teacher: nn.Module,
    process: NoiseProcess,
    conditions: Conditions,
    noisy: Tensor,
    prediction: Tensor,
    levels: Tensor,
    later: Tensor,
) -> Tensor:
    """Surrogate whose gradient is that of the KL divergence between student's and teacher's samples x̂_t at level t.

    Eq. 12: the gradient with respect to x̂_t is ``-(s_t(x̂_t) - ŝ_t(x̂_t))``. The student itself estimates the score ŝ of
    its distribution, so no further network is needed. Each score follows from the noise ε that a model predicts for
    x̂_t, ``s = -ε/add``; for flow matching this is eq. 13, ``s - ŝ = -(1 - t)/t (u - û)``.

    The paper was known only from its abstract and secondary notes, so the following is derived: x̂_t is one
    deterministic step of the student from ``noisy`` at a higher level, and the prediction there has a gradient; the
    expectation is a mean over elements; noise and v prediction, which the paper does not treat, are handled alike.

    Args:
        student: the model without wrappers that synchronize gradients; it is called without gradients here.
        noisy: (B, …) at ``levels``. prediction: the student's prediction for it, same shape.
        levels, later: (B,), later ≤ levels.
    Returns: () float32, half the mean squared difference of the scores.
    """
    sample = process.step(noisy, prediction.float(), levels, later)
    with torch.no_grad():
        arguments = conditions.arguments(sample, process.timestep(later))
        channels = sample.shape[1]
        ours, theirs = (model(**arguments)[0].float()[:, :channels] for model in (student, teacher))
        gap = process.score(sample, theirs, later) - process.score(sample, ours, later)
    return gap.square().mean() / 2 - (gap * (sample - sample.detach())).mean()
