"""What a run tells whoever started it from Python, as it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from .noise import NoiseProcess
from .samples import Samples

__all__ = ["Watch"]


class Watch:
    """Does nothing; made to be subclassed. Any method may raise ``KeyboardInterrupt``: the run then stops as by a
    signal, and goes on when it is called again. Of several processes each has its own.
    """

    def check(self) -> None:
        """Before every forward of the denoiser, teacher's and student's; of captured steps at the capture alone."""

    def sample(self, made: int, total: int | None) -> None:
        """So many samples are there, of how many where that is known."""

    def ready(self, model: nn.Module, process: NoiseProcess, samples: Samples) -> None:
        """All samples are; the denoiser is still the teacher."""

    def begin(self, step: int, history: Sequence[Mapping[str, float]]) -> None:
        """Training begins, or goes on after this step, whose losses are the last of ``history``."""

    def picture(self, step: int, path: Path) -> None:
        """A picture of teacher and student was written; at step 0 the student is not trained yet."""

    def step(self, step: int, losses: Mapping[str, float]) -> None:
        """The step is done, and so are its pictures and checkpoint."""
