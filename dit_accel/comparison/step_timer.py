"""Timing of a pipeline's denoising steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn

__all__ = ["StepTimer", "synchronize"]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class StepTimer:
    """Context that times each forward pass of the denoisers, from the first pre-hook to the last hook.

    ``with StepTimer(models, device) as timer: pipe(...)``, then :meth:`seconds_per_step`.
    """

    def __init__(self, models: Iterable[nn.Module], device: torch.device) -> None:
        self.models = list(models)
        self.device = device
        self.forwards: list[float] = []
        self._handles: list[Any] = []
        self._began = 0.0

    def _begin(self, *_: Any) -> None:
        synchronize(self.device)
        self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        synchronize(self.device)
        self.forwards.append(time.perf_counter() - self._began)

    def __enter__(self) -> StepTimer:
        for model in self.models:
            self._handles.append(model.register_forward_pre_hook(self._begin, prepend=True))
            self._handles.append(model.register_forward_hook(self._end))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def seconds_per_step(self, steps: int) -> float:
        """Median over the steps of the denoiser's seconds (all forward passes of a step, such as two with guidance).

        If the number of forward passes is not a multiple of ``steps``, the mean.

        Raises: RuntimeError: no denoiser was called.
        """
        if not self.forwards:
            raise RuntimeError("the pipeline never called its denoiser, so there are no times")
        each, left = divmod(len(self.forwards), steps)
        if left or not each:
            return sum(self.forwards) / steps
        return statistics.median(sum(self.forwards[i : i + each]) for i in range(0, len(self.forwards), each))
