"""Encoding of pictures and clips to the latents of a pipeline's denoiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["encode"]


@torch.no_grad()
def encode(pipe: Any, pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Encode a picture or clip to latents, scaled and packed as the pipeline does.

    Latents are packed only if the denoiser takes a sequence.

    Args:
        pixels: (1, 3, height, width) or (1, 3, T, height, width) in [-1, 1].
        shape: shape of the denoiser's latents for this size.
    Returns: latents of shape ``shape``, float32.
    Raises: ValueError: the pipeline has another layout of latents.
    """
    vae = pipe.vae
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        mean, std = torch.tensor(vae.config.get("shift_factor") or 0.0), torch.tensor(1.0)
    latents = (latents - mean.to(latents)) / std.to(latents) * (vae.config.get("scaling_factor") or 1.0)
    if len(shape) == 3 and latents.dim() == 4 and hasattr(pipe, "_pack_latents"):
        batch, channels, height, width = latents.shape
        latents = pipe._pack_latents(latents, batch, channels, height, width)
    if tuple(latents.shape) != tuple(shape):
        kind = "picture" if pixels.dim() == 4 else "clip"
        raise ValueError(
            f"{type(pipe).__name__}: encoding a {kind} gives latents {tuple(latents.shape)}, its denoiser takes "
            f"{tuple(shape)}: --data is not supported for this pipeline, use --data-free"
        )
    return latents


def _per_channel(vae: Any, name: str, latents: Tensor) -> Tensor | None:
    """Per-channel value of the autoencoder's configuration or buffers, broadcastable to ``latents``; None if unset."""
    figures = vae.config.get(name)
    figures = dict(vae.named_buffers()).get(name) if figures is None else figures
    return None if figures is None else torch.as_tensor(figures).view(1, -1, *[1] * (latents.dim() - 2))
