"""Pictures as the latents that a pipeline's denoiser works on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["Unreadable", "encode", "read_picture"]


class Unreadable(ValueError):
    """A file that is no picture."""


def read_picture(path: Path, height: int, width: int) -> Tensor:
    """(1, 3, height, width) float32 in [-1, 1]: the largest part in the middle that has these proportions, resized.

    Raises: Unreadable: it cannot be read as a picture.
    """
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's for what is no picture
        raise Unreadable(f"{path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def encode(pipe: Any, pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Latents of a picture, scaled and, where the denoiser takes a sequence, packed as the pipeline does it.

    Args:
        pixels: (1, 3, height, width) in [-1, 1].
        shape: what the denoiser takes for a picture of this size.
    Raises: ValueError: the pipeline's latents are of another kind than those known here.
    """
    vae = pipe.vae
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    config = vae.config
    if config.get("latents_mean") is not None:
        mean, std = (
            torch.tensor(config[x], device=latents.device).view(1, -1, 1, 1) for x in ("latents_mean", "latents_std")
        )
        latents = (latents - mean) / std
    else:
        latents = (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor
    if len(shape) == 3 and hasattr(pipe, "_pack_latents"):
        batch, channels, height, width = latents.shape
        latents = pipe._pack_latents(latents, batch, channels, height, width)
    if tuple(latents.shape) != tuple(shape):
        raise ValueError(
            f"{type(pipe).__name__}: a picture's latents are {tuple(latents.shape)} and its denoiser takes "
            f"{tuple(shape)}; pictures of one's own are not supported for it, use --data-free"
        )
    return latents
