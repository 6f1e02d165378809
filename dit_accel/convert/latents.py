"""Pictures and clips as the latents that a pipeline's denoiser works on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["encode"]


@torch.no_grad()
def encode(pipe: Any, pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Latents of a picture or clip, scaled and, where the denoiser takes a sequence, packed as the pipeline does it.

    Args:
        pixels: (1, 3, height, width) or (1, 3, T, height, width) in [-1, 1].
        shape: what the denoiser takes for this size.
    Raises: ValueError: the pipeline's latents are of another kind than those known here.
    """
    vae = pipe.vae
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = (_each_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        mean, std = torch.tensor(vae.config.get("shift_factor") or 0.0), torch.tensor(1.0)
    latents = (latents - mean.to(latents)) / std.to(latents) * (vae.config.get("scaling_factor") or 1.0)
    if len(shape) == 3 and latents.dim() == 4 and hasattr(pipe, "_pack_latents"):
        batch, channels, height, width = latents.shape
        latents = pipe._pack_latents(latents, batch, channels, height, width)
    if tuple(latents.shape) != tuple(shape):
        kind = "picture" if pixels.dim() == 4 else "clip"
        raise ValueError(
            f"{type(pipe).__name__}: a {kind}'s latents are {tuple(latents.shape)} and its denoiser takes "
            f"{tuple(shape)}; {kind}s of one's own are not supported for it, use --data-free"
        )
    return latents


def _each_channel(vae: Any, name: str, latents: Tensor) -> Tensor | None:
    """A figure for each channel of the latents, from the autoencoder's configuration or its buffers."""
    figures = vae.config.get(name)
    figures = dict(vae.named_buffers()).get(name) if figures is None else figures
    return None if figures is None else torch.as_tensor(figures).view(1, -1, *[1] * (latents.dim() - 2))
