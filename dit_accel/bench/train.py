"""``dit-accel bench train``: training steps of a few blocks, dense against ours, and their memory by tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import TRAINING
from .request import Request
from .results import Row
from .step import StepKind, measure_steps, tell, title
from .timing import fit_growth

__all__ = ["KIND", "run", "summarise_memory"]

_FIGURES = (
    "One training step, batch 1: forward, mean squared error, backward, AdamW over all weights, in the precision of "
    "the weights; its learning rate is 0, which costs the same and leaves the weights as they were. "
    "checkpointing: whether blocks are computed anew in the backward pass. dense: compile_repeated_blocks("
    "fullgraph=True) on the untouched model; sla: the mechanism set, its learned projection random and trained, too, "
    "and compiled the same way; -eager: without. Softmax attention is cuDNN's on an NVIDIA GPU. first_step_s: the "
    "first step, with compilation, tuning and plans. peak_bytes: beyond weights, inputs and the optimizer's state; "
    "gradients included. times_dense: ms of the baseline (compiled for compiled, eager for eager, where measured) over "
    "this row's. drift: dense once more after all the others, over the first time. memory: e of peak_bytes ~ tokens^e, "
    "by least squares on the logarithms over so many lengths. by_kernel: ms of one more step under the profiler."
)


def _title(row: Row) -> str:
    return title(row) + (", checkpointing" if row["checkpointing"] else "")


@contextmanager
def _training(model: nn.Module, inputs: dict[str, Any], request: Request) -> Iterator[Callable[[], Tensor]]:
    """A step that gives its loss; the model is as it was afterwards."""
    model.train().requires_grad_(True)
    if request.checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    target = torch.randn_like(inputs["hidden_states"])

    def step() -> Tensor:
        loss = F.mse_loss(model(**inputs, return_dict=False)[0].float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    try:
        yield step
    finally:
        optimizer.zero_grad()
        if request.checkpointing:
            model.disable_gradient_checkpointing()  # type: ignore[operator]
        model.eval().requires_grad_(False)


def summarise_memory(rows: list[Row]) -> Row:
    """Exponents of peak memory by variant, where three lengths were measured."""
    memory = []
    for variant, checkpointing in dict.fromkeys((row["variant"], row["checkpointing"]) for row in rows):
        mine = [row for row in rows if (row["variant"], row["checkpointing"]) == (variant, checkpointing)]
        points = [(row["tokens"], row["peak_bytes"]) for row in mine if row.get("peak_bytes")]
        if (fit := fit_growth(points)) is not None:
            memory.append({"variant": variant, "checkpointing": checkpointing, **fit})
    return {"memory": memory}


KIND = StepKind(
    "train", _FIGURES, _title, tell, summarise_memory, prepare=_training,
    facts=lambda request: {"checkpointing": request.checkpointing},
)  # fmt: skip


def run(request: Request) -> int:
    """Measure the lengths, one after the other; every finished variant is on disk at once.

    Returns: exit status: 0, or 1 if a variant failed.
    Raises:
        BadInput: unknown model or variant; nothing was measured.
        KeyboardInterrupt: stopped; what was finished is on disk.
    """
    return measure_steps(KIND, TRAINING, request)
