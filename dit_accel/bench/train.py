"""``dit-accel bench train``: training steps of a few blocks, dense and ours, and their peak memory over tokens."""

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
from .step import StepKind, measure_steps, result_line, title
from .timing import fit_growth

__all__ = ["KIND", "run", "summarise_memory"]

_FIGURES = (
    "One training step, batch 1: forward pass, mean squared error, backward pass, AdamW on all weights in their own "
    "precision; the learning rate is 0, which takes the same time and keeps the weights. checkpointing: whether "
    "gradient checkpointing is used. dense: the original model with compile_repeated_blocks(fullgraph=True); sla: with "
    "the mechanism, a random learned projection, which is trained, too, and compiled the same way; -eager: not "
    "compiled. Softmax attention is cuDNN's on an NVIDIA GPU. first_step_s: the first step, including compilation, "
    "autotuning and plans. peak_bytes: peak memory minus weights, inputs and optimizer state, including gradients. "
    "times_dense: the baseline's ms / this row's ms; the baseline is the dense variant with the same compilation, if "
    "it was measured. drift: time of dense repeated at the end / its first time. memory: e of peak_bytes ~ tokens^e, "
    "least squares on the logarithms over `sizes` lengths. by_kernel: ms per kernel of one step under the profiler."
)


def _title(row: Row) -> str:
    return title(row) + (", checkpointing" if row["checkpointing"] else "")


@contextmanager
def _training(model: nn.Module, inputs: dict[str, Any], request: Request) -> Iterator[Callable[[], Tensor]]:
    """Context with a training step that returns its loss; the model is restored afterwards."""
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
    """Exponents of peak memory per variant, if at least three lengths were measured."""
    memory = []
    for variant, checkpointing in dict.fromkeys((row["variant"], row["checkpointing"]) for row in rows):
        mine = [row for row in rows if (row["variant"], row["checkpointing"]) == (variant, checkpointing)]
        points = [(row["tokens"], row["peak_bytes"]) for row in mine if row.get("peak_bytes")]
        if (fit := fit_growth(points)) is not None:
            memory.append({"variant": variant, "checkpointing": checkpointing, **fit})
    return {"memory": memory}


KIND = StepKind(
    "train", _FIGURES, _title, result_line, summarise_memory, prepare=_training,
    facts=lambda request: {"checkpointing": request.checkpointing},
)  # fmt: skip


def run(request: Request) -> int:
    """Measure the lengths in order; each variant is saved as soon as it is finished.

    Returns: exit status: 0, or 1 if a variant failed.
    Raises:
        BadInput: unknown model or variant; nothing was measured.
        KeyboardInterrupt: stopped; finished variants are saved.
    """
    return measure_steps(KIND, TRAINING, request)
