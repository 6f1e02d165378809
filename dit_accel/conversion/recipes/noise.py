"""Noise processes of schedulers: the mixture of clean latents and noise, and the denoiser's training target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["NoiseProcess", "noise_process"]

LEAST = 0.02


@dataclass(frozen=True)
class NoiseProcess:
    """Latents at a timestep t: ``keep[t] · clean + add[t] · noise``.

    Attributes:
        prediction: "flow" (noise - clean), "epsilon" (noise) or "v_prediction" (keep · noise - add · clean).
        timesteps: number of timesteps T.
        keep, add: (T,) float32 by timestep for diffusion models; None for flow matching: 1 - σ and σ.
        shift: the scheduler's shift of noise levels, σ → shift·σ / (1 + (shift - 1) σ).
        sampling: distribution of training levels for flow matching: "shift" (logit-normal, then shifted [SD3, arXiv
            2403.03206]), "uniform", or "mixed" (each of the two for half of the samples).
    """

    prediction: str
    timesteps: int
    keep: Tensor | None = None
    add: Tensor | None = None
    shift: float = 1.0
    sampling: str = "shift"

    def draw(self, generator: torch.Generator) -> float:
        """Draw a training level in (0, 1); uniform for diffusion models."""
        if self.keep is not None:
            return float((torch.randint(self.timesteps, (), generator=generator) + 0.5) / self.timesteps)
        uniform = self.sampling == "uniform"
        if self.sampling == "mixed":
            uniform = bool(torch.rand((), generator=generator) < 0.5)
        if uniform:
            return float(torch.rand((), generator=generator))
        sigma = float(torch.sigmoid(torch.randn((), generator=generator)))
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def timestep(self, levels: Tensor) -> Tensor:
        """(B,) float32 timesteps in the scheduler's unit."""
        if self.keep is not None:
            return (levels * self.timesteps).floor()
        return levels * self.timesteps

    def mix(self, clean: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and the denoiser's target, both in the shape of ``clean``. levels: (B,)."""
        keep, add = self._shaped_weights(clean, levels)
        noisy = keep * clean + add * noise
        if self.prediction == "flow":
            return noisy, noise - clean
        return noisy, noise if self.prediction == "epsilon" else keep * noise - add * clean

    def draw_later(self, level: float, generator: torch.Generator) -> float:
        """Draw a lower level on the same trajectory, uniform in [``LEAST``, level]; below ``LEAST`` scores diverge."""
        part = float(torch.rand((), generator=generator))
        return level if level <= LEAST else LEAST + part * (level - LEAST)

    def estimates(self, noisy: Tensor, prediction: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of the clean latents and the noise in ``noisy``, from a prediction; all (B, …). levels: (B,)."""
        keep, add = self._shaped_weights(noisy, levels)
        if self.prediction == "flow":
            return noisy - add * prediction, noisy + keep * prediction
        if self.prediction == "epsilon":
            return (noisy - add * prediction) / keep, prediction
        return keep * noisy - add * prediction, add * noisy + keep * prediction

    def step(self, noisy: Tensor, prediction: Tensor, levels: Tensor, later: Tensor) -> Tensor:
        """Latents at another level, without new noise: an Euler step for flow matching, else a DDIM step.

        [DDIM, arXiv 2010.02502, eq. 12 with σ = 0] levels, later: (B,).
        """
        clean, noise = self.estimates(noisy, prediction, levels)
        keep, add = self._shaped_weights(noisy, later)
        return keep * clean + add * noise

    def score(self, noisy: Tensor, prediction: Tensor, levels: Tensor) -> Tensor:
        """Estimate of the score ∇ log p of the noisy latents, ``-noise / add``, from a prediction; (B, …)."""
        return -self.estimates(noisy, prediction, levels)[1] / self._shaped_weights(noisy, levels)[1]

    def _shaped_weights(self, latents: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        keep, add = (x.view(-1, *[1] * (latents.dim() - 1)) for x in self._weights(levels))
        return keep, add

    def _weights(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        if self.keep is None or self.add is None:
            return 1 - levels, levels
        index = self.timestep(levels).long().to(self.keep.device)
        return self.keep[index].to(levels.device), self.add[index].to(levels.device)

    def to(self, device: torch.device) -> NoiseProcess:
        """The process with its tables on a device, which avoids a synchronization if the levels are there, too."""
        if self.keep is None or self.add is None:
            return self
        return replace(self, keep=self.keep.to(device), add=self.add.to(device))


def noise_process(scheduler: Any) -> NoiseProcess:
    """Noise process of a diffusers scheduler.

    Raises: ValueError: the scheduler's training objective is not supported.
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
