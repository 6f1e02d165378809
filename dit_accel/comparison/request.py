"""Options of a ``dit-accel compare`` run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.bundled import select_embedded
from ..common.choices import check_count
from ..mechanisms.attn_spec import AttentionSpec

__all__ = ["Request"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options, checked as far as possible without the pipeline. None: the pipeline's default.

    Attributes:
        attention: names with options, or arguments of ``load_attention``.
        command: arguments of the command or call, for the report.

    Raises: TypeError, ValueError: a value of the wrong type or out of range, or options that exclude each other.
    """

    attention: tuple[AttentionSpec | str, ...]
    out: Path
    device: torch.device
    dtype: torch.dtype
    pipeline: str | None = None
    video: bool = False
    prompts: tuple[str, ...] = ()
    steps: int | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        select_embedded(self.pipeline, self.video)
        if any(not text.strip() for text in self.prompts):
            raise ValueError("a --prompt is empty")
        check_count("--seed", self.seed, 0)
        for name in ("steps", "height", "width", "frames"):
            check_count(f"--{name}", getattr(self, name), optional=True)
