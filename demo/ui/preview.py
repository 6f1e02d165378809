"""Preview of a picture while it is drawn: an estimate of its clean latents, decoded at half the size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dit_accel.comparison.sizes import Size

__all__ = ["Preview"]


class Preview:
    """Preview of one drawing. Call :meth:`update` after each step, and :meth:`picture` for the current preview."""

    def __init__(self, pipe: Any, size: Size) -> None:
        self.pipe, self.size = pipe, size
        self._latents: list[Tensor] = []  # after the last step and after the one before
        self._step = 0

    def update(self, step: int, latents: Tensor) -> None:
        """Store the latents after ``step`` steps."""
        self._latents, self._step = [latents, *self._latents[:1]], step

    def picture(self) -> NDArray[np.uint8] | None:
        """(H, W, 3) picture, for a clip its middle frame; None for pipelines with an unknown layout of latents."""
        vae = getattr(self.pipe, "vae", None)
        if vae is None:
            return None
        latents = _unpacked(self.pipe, self._extrapolate(), self.size)
        if latents is None:
            return None
        with torch.no_grad():
            pixels = vae.decode(F.avg_pool2d(latents, 2).to(vae.dtype) if latents.ndim == 4 else latents).sample[0]
        pixels = pixels if pixels.ndim == 3 else pixels[:, 0]
        values = (pixels.float().permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).nan_to_num()
        return (values * 255).round().to(torch.uint8).cpu().numpy()

    def _extrapolate(self) -> Tensor:
        """Clean latents by linear extrapolation of the last Euler step to sigma = 0."""
        sigmas = getattr(self.pipe.scheduler, "sigmas", None)
        if len(self._latents) < 2 or sigmas is None or self._step >= len(sigmas):
            return self._latents[0]
        now, before = float(sigmas[self._step]), float(sigmas[self._step - 1])
        if now == before:
            return self._latents[0]
        return self._latents[0] - now * (self._latents[0] - self._latents[1]) / (now - before)


def _unpacked(pipe: Any, latents: Tensor, size: Size) -> Tensor | None:
    """Latents in the autoencoder's layout: (B, C, H, W), for a clip (B, C, 1, H, W) from its middle."""
    if latents.ndim == 3 and hasattr(pipe, "_unpack_latents") and size.frames is None:
        latents = pipe._unpack_latents(latents, size.height, size.width, pipe.vae_scale_factor)
    config = pipe.vae.config
    if latents.ndim == 5 and getattr(config, "latents_mean", None) is not None:
        middle = latents.shape[2] // 2
        mean, std = (
            latents.new_tensor(value).view(1, -1, 1, 1, 1) for value in (config.latents_mean, config.latents_std)
        )
        return latents[:, :, middle : middle + 1] * std + mean
    if latents.ndim == 4 and getattr(config, "scaling_factor", None):
        return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
    return None
