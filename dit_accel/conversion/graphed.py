"""Losses and gradients of a batch as CUDA graphs, for models whose kernels run faster than the host can launch them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from ..common.errors import BadInput
from .recipes.objective import Batch

__all__ = ["GraphedGradients"]

_WARM_UP = 2  # runs before the capture, since compilation and lazy allocations must not be captured


class GraphedGradients:
    """``gradients`` as one CUDA graph per kind of batch; it returns losses and adds to the parameters' gradients."""

    def __init__(self, gradients: Callable[[Batch], dict[str, Tensor]], parameters: Iterable[Tensor]) -> None:
        self.gradients, self.parameters = gradients, list(parameters)
        self.captured: dict[Hashable, _Captured] = {}

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Add the batch's gradients to the existing ones and return the losses.

        The next call overwrites the returned tensors.

        Raises: BadInput: the forward or backward pass synchronizes with the GPU, so it cannot be captured.
        """
        if batch.kind not in self.captured:
            self.captured[batch.kind] = self._capture(batch)
        return self.captured[batch.kind](batch)

    def _capture(self, batch: Batch) -> _Captured:
        batch = batch.clone()  # the graph's inputs; position ids are read, with a synchronization, in the warm-up
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.gradients(batch)
        torch.cuda.current_stream().wait_stream(side)
        for parameter, earlier in zip(self.parameters, before, strict=True):
            if parameter.grad is not None:
                parameter.grad.zero_() if earlier is None else parameter.grad.copy_(earlier)
        try:
            return _Captured(self.gradients, batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise BadInput(
                f"a training step of this model cannot be captured as a CUDA graph: leave --cuda-graph out ({error})"
            ) from error


class _Captured:
    """A captured graph with its input batch and its losses."""

    def __init__(self, gradients: Callable[[Batch], dict[str, Tensor]], batch: Batch) -> None:
        self.batch, self.graph = batch, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.losses = gradients(batch)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        torch._foreach_copy_(self.batch.tensors(), batch.tensors())
        self.graph.replay()
        return self.losses
