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
    """Kullback-Leibler divergence of the student's samples x̂_t to the teacher's at a level t, by its gradient alone.

    Eq. 12: the gradient with respect to x̂_t is ``-(s_t(x̂_t) - ŝ_t(x̂_t))``; the score ŝ of the student's distribution is
    estimated by the student itself, with no network more. Either is that of the noise ε which a model sees in x̂_t,
    ``s = -ε/add``; for flow matching that makes eq. 13, ``s - ŝ = -(1 - t)/t (u - û)``.

    Derived, since the paper was known from its abstract and others' notes only: x̂_t is one deterministic step of the
    student from ``noisy`` at a higher level, its prediction there having a gradient; the expectation is a mean over
    elements; and the same for noise and v prediction, which the paper does not treat.

    Args:
        student: without wrappers that synchronise gradients; here it is called without any.
        noisy: (B, …) at ``levels``. prediction: the student's of it, in its shape.
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
