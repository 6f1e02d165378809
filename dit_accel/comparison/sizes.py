"""Picture sizes that a pipeline supports, and their token grids."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from ..common.attention_group import TokenBox
from ..install.families import family_of
from ..install.installation import denoisers

__all__ = ["Size", "check_size", "default_size", "parse_size", "token_box", "token_grid"]


@dataclass(frozen=True)
class Size:
    """Height and width in pixels, and the number of frames for video pipelines."""

    height: int
    width: int
    frames: int | None = None

    def __str__(self) -> str:
        return f"{self.height}×{self.width}" + (f", {self.frames} frames" if self.frames else "")


def parse_size(text: str) -> Size:
    """Parse ``512x768`` (height, width) or ``480x832x81`` (height, width, frames).

    Raises: ValueError: the text has another form.
    """
    found = re.fullmatch(r"(\d+)[x×](\d+)(?:[x×](\d+))?", text.strip().lower())
    lengths = [int(part) for part in found.groups() if part] if found else [0]
    if 0 in lengths:
        raise ValueError(
            f"--size takes HEIGHTxWIDTH, or HEIGHTxWIDTHxFRAMES for clips, such as 480x832x81, got {text!r}"
        )
    return Size(*lengths)


def token_box(pipe: Any) -> TokenBox | None:
    """Token box of a pipeline of a known family; None for other pipelines, which check sizes themselves."""
    model = next(iter(denoisers(pipe).values()))
    family = family_of(model)
    return None if family is None else family.token_box(pipe, model)


def default_size(pipe: Any) -> Size | None:
    """Default size of a pipeline; None if it has none."""
    parameters = inspect.signature(pipe.__call__).parameters
    defaults = [getattr(parameters.get(name), "default", None) for name in ("height", "width", "num_frames")]
    height, width, frames = (value if isinstance(value, int) else None for value in defaults)
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
    """Check that the pipeline draws exactly this size, without rounding.

    Raises: ValueError: the size is not a multiple of the token size; the message lists the nearest valid sizes.
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
    """Token grid of a picture of this size (for a U-Net, the finest with attention); None for unknown families."""
    box = token_box(pipe)
    if box is None:
        return None
    grid = (size.height // box.side[0], size.width // box.side[1])
    if box.frames is None:
        return grid
    latent_frames = ((size.frames or 1) - 1) // box.frames + 1
    return (latent_frames // box.patch_frames, *grid)
