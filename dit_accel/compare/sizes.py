"""Which picture sizes a pipeline takes, and the token grid that they are cut into."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from ..install import denoisers

__all__ = ["Size", "TokenBox", "check_size", "default_size", "token_box", "token_grid"]


@dataclass(frozen=True)
class Size:
    """Height and width in pixels, and frames where the pipeline draws clips."""

    height: int
    width: int
    frames: int | None = None

    def __str__(self) -> str:
        return f"{self.height}×{self.width}" + (f", {self.frames} frames" if self.frames else "")


@dataclass(frozen=True)
class TokenBox:
    """Pixels (and frames) that one token stands for, and what the sizes must be multiples of.

    Args:
        side: height and width in pixels of the patch behind one token.
        multiple: what height and width must be multiples of.
        frames: a clip's frames are this many times a whole number, plus one; None for pictures.
        patch_frames: latent frames in one token.
    """

    side: tuple[int, int]
    multiple: tuple[int, int]
    frames: int | None = None
    patch_frames: int = 1


def token_box(pipe: Any) -> TokenBox | None:
    """The token box of a pipeline of a known family; None for others, whose own checks have to do."""
    model = next(iter(denoisers(pipe).values()))
    if isinstance(model, FluxTransformer2DModel):
        side = pipe.vae_scale_factor * 2  # 2×2 latent places are packed into a token
        return TokenBox((side, side), (side, side))
    if isinstance(model, SD3Transformer2DModel):
        side = pipe.vae_scale_factor * model.config.patch_size
        return TokenBox((side, side), (side, side))
    if isinstance(model, (WanTransformer3DModel, WanVACETransformer3DModel)):
        patch_frames, *patch = model.config.patch_size
        rows, columns = (pipe.vae_scale_factor_spatial * n for n in patch)
        return TokenBox(  # Wan's pipelines insist on 16 whatever their VAE
            (rows, columns), (math.lcm(16, rows), math.lcm(16, columns)), pipe.vae_scale_factor_temporal, patch_frames
        )
    if isinstance(model, UNet2DConditionModel):
        blocks = model.config.down_block_types
        first = next((i for i, kind in enumerate(blocks) if "Attn" in kind), len(blocks) - 1)
        side = pipe.vae_scale_factor * 2**first
        return TokenBox((side, side), (math.lcm(8, pipe.vae_scale_factor),) * 2)
    return None


def default_size(pipe: Any) -> Size | None:
    """The size that the pipeline draws when none is given; None where it does not say."""
    parameters = inspect.signature(pipe.__call__).parameters
    told = [getattr(parameters.get(name), "default", None) for name in ("height", "width", "num_frames")]
    height, width, frames = (value if isinstance(value, int) else None for value in told)
    if height is None or width is None:
        sample = getattr(pipe, "default_sample_size", None)
        if sample is None:
            sample = getattr(next(iter(denoisers(pipe).values())).config, "sample_size", None)
        factor = getattr(pipe, "vae_scale_factor", None)
        if not (isinstance(sample, int) and isinstance(factor, int)):
            return None
        height = width = sample * factor
    return Size(height, width, frames)


def check_size(pipe: Any, size: Size) -> None:
    """Refuse a size that the pipeline would round, or could not draw.

    Raises: ValueError: which size, what it must be a multiple of, and the nearest ones that are.
    """
    box = token_box(pipe)
    if box is None:
        return
    name = type(pipe).__name__
    lengths = {"height": size.height, "width": size.width}
    if any(length % multiple for length, multiple in zip(lengths.values(), box.multiple, strict=True)):
        near = [_nearest(length, multiple) for length, multiple in zip(lengths.values(), box.multiple, strict=True)]
        multiples = " and ".join(
            f"{axis} in multiples of {multiple}" for axis, multiple in zip(lengths, box.multiple, strict=True)
        )
        raise ValueError(
            f"{name} takes {multiples}, got {size.height}×{size.width}; nearest: "
            + " or ".join(dict.fromkeys(f"{height}×{width}" for height, width in zip(*near, strict=True)))
        )
    if size.frames is not None and box.frames is not None and (size.frames - 1) % (box.frames * box.patch_frames):
        step = box.frames * box.patch_frames
        below = (size.frames - 1) // step * step + 1
        raise ValueError(
            f"{name} takes a multiple of {step} plus one as the number of frames, got {size.frames}; "
            f"nearest: {below} or {below + step}"
        )


def _nearest(length: int, multiple: int) -> tuple[int, int]:
    below = max(length // multiple, 1) * multiple
    return below, below if length % multiple == 0 else max(-(-length // multiple), 1) * multiple


def token_grid(pipe: Any, size: Size) -> tuple[int, ...] | None:
    """The grid that a picture of this size becomes (a U-Net's finest with attention); None for unknown families."""
    box = token_box(pipe)
    if box is None:
        return None
    grid = (size.height // box.side[0], size.width // box.side[1])
    if box.frames is None:
        return grid
    latent_frames = ((size.frames or 1) - 1) // box.frames + 1
    return (latent_frames // box.patch_frames, *grid)
