"""A batch's losses and gradients as CUDA graphs: where the host starts kernels more slowly than the GPU runs them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from ..errors import BadInput
from .objective import Batch

__all__ = ["GraphedGradients"]

_WARM_UP = 2  # runs before the capture: what they compile and allocate must not be captured


class GraphedGradients:
    """Runs ``gradients``, which adds to the gradients of the parameters, as one CUDA graph for each kind of batch."""

    def __init__(self, gradients: Callable[[Batch], dict[str, Tensor]], parameters: Iterable[Tensor]) -> None:
        self.gradients, self.parameters = gradients, list(parameters)
        self.captured: dict[Hashable, _Captured] = {}

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """The losses, and the gradients added to those that are there. Replayed: what it returned is overwritten by the
        next call.

        Raises: BadInput: the model's forward or backward pass waits for the GPU somewhere, and cannot be captured.
        """
        if batch.kind not in self.captured:
            self.captured[batch.kind] = self._capture(batch)
        return self.captured[batch.kind](batch)

    def _capture(self, batch: Batch) -> _Captured:
        batch = batch.clone()  # the graph's own; that its warm-up has read what waits for the GPU: position ids
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
                f"this model's step cannot be captured as a CUDA graph: leave --cuda-graph out ({error})"
            ) from error


class _Captured:
    def __init__(self, gradients: Callable[[Batch], dict[str, Tensor]], batch: Batch) -> None:
        self.batch, self.graph = batch, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.losses = gradients(batch)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        torch._foreach_copy_(self.batch.tensors(), batch.tensors())
        self.graph.replay()
        return self.losses
