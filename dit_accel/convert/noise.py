"""Noise levels of a scheduler: how clean latents and noise are mixed, and what the denoiser is to predict of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["NoiseProcess", "noise_process"]


@dataclass(frozen=True)
class NoiseProcess:
    """Latents at a timestep t: ``keep[t] · clean + add[t] · noise``.

    prediction: "flow" (noise - clean), "epsilon" (noise) or "v_prediction" (keep · noise - add · clean).
    keep, add: of diffusion models, (T,) float32 by timestep; None for flow matching, where they are 1 - σ and σ.
    timesteps: T. shift: σ → shift·σ / (1 + (shift - 1) σ), as the scheduler spaces its own.
    """

    prediction: str
    timesteps: int
    keep: Tensor | None = None
    add: Tensor | None = None
    shift: float = 1.0

    def draw(self, generator: torch.Generator) -> float:
        """A level in (0, 1): in flow matching logit-normal and shifted [SD3, arXiv 2403.03206], else uniform."""
        if self.keep is not None:
            return float((torch.randint(self.timesteps, (), generator=generator) + 0.5) / self.timesteps)
        sigma = float(torch.sigmoid(torch.randn((), generator=generator)))
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def timestep(self, levels: Tensor) -> Tensor:
        """(B,) float32 timesteps in the scheduler's unit."""
        if self.keep is not None:
            return (levels * self.timesteps).floor()
        return levels * self.timesteps

    def mix(self, clean: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents, and what the denoiser is to predict, both in the shape of ``clean``. levels: (B,)."""
        keep, add = (x.view(-1, *[1] * (clean.dim() - 1)) for x in self._weights(levels))
        noisy = keep * clean + add * noise
        if self.prediction == "flow":
            return noisy, noise - clean
        return noisy, noise if self.prediction == "epsilon" else keep * noise - add * clean

    def _weights(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        if self.keep is None or self.add is None:
            return 1 - levels, levels
        index = self.timestep(levels).long().cpu()
        return self.keep[index].to(levels.device), self.add[index].to(levels.device)


def noise_process(scheduler: Any) -> NoiseProcess:
    """The noise process that a diffusers scheduler samples from.

    Raises: ValueError: a scheduler whose training objective is not known.
    """
    config = scheduler.config
    timesteps = int(config.get("num_train_timesteps", 1000))
    if "flow" in type(scheduler).__name__.lower() or config.get("use_flow_sigmas"):
        return NoiseProcess("flow", timesteps, shift=float(config.get("shift") or config.get("flow_shift") or 1.0))
    products = getattr(scheduler, "alphas_cumprod", None)
    prediction = config.get("prediction_type", "epsilon")
    if products is None or prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type {prediction!r}: expected a flow-matching scheduler, or "
            "one with alphas_cumprod and epsilon or v_prediction"
        )
    products = products.float().cpu()
    return NoiseProcess(prediction, timesteps, products.sqrt(), (1 - products).sqrt())
