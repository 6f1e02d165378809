"""What ``dit-accel compare`` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..attn_spec import AttentionSpec

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """Checked as far as it can be without the pipeline. None: take the pipeline's own. attention: by name and options,
    or what ``load_attention`` takes."""

    pipeline: str | None
    video: bool
    prompts: tuple[str, ...]
    attention: tuple[AttentionSpec | str, ...]
    steps: int | None
    seed: int
    height: int | None
    width: int | None
    frames: int | None
    device: torch.device
    dtype: torch.dtype
    out: Path
    command: tuple[str, ...]
