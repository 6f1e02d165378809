"""Options of a ``dit-accel compare`` run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..mechanisms.attn_spec import AttentionSpec

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """Options, checked as far as possible without the pipeline. None: the pipeline's default.

    ``attention``: names with options, or arguments of ``load_attention``.
    """

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
