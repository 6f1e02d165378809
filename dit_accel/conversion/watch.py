"""Callbacks for progress of a conversion that is started from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from .data.samples import Samples
from .recipes.noise import NoiseProcess

__all__ = ["Watch"]


class Watch:
    """Base class for callbacks; its methods do nothing.

    Any method may raise ``KeyboardInterrupt``: the run then stops as after a signal, and resumes when it is started
    again. Each process has its own instance.
    """

    def check(self) -> None:
        """Called before every forward pass of teacher and student; for CUDA graphs only during the capture."""

    def sample(self, made: int, total: int | None) -> None:
        """Called after each sample. made: number of samples so far. total: None if it is unknown."""

    def ready(self, model: nn.Module, process: NoiseProcess, samples: Samples) -> None:
        """Called when all samples exist and the denoiser is still the teacher."""

    def begin(self, step: int, history: Sequence[Mapping[str, float]]) -> None:
        """Called when training begins or resumes after ``step``. history: losses of all steps so far."""

    def picture(self, step: int, path: Path) -> None:
        """Called when a picture of teacher and student was written; at step 0 the student is untrained."""

    def step(self, step: int, losses: Mapping[str, float]) -> None:
        """Called after each step, once its pictures and its checkpoint are written."""
