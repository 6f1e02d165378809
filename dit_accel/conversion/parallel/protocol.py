"""Protocol of training in the processes of a launch: what differs between plain processes, FSDP and DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dit_accel.common.errors import BadInput

__all__ = ["Parallel", "check_origin"]


class Parallel(Protocol):
    """Preparation of the models, and access to parameters, gradients and optimizer state.

    Attributes:
        collective: whether parameters are gathered by all processes together. If so, each process draws and saves, and
            the main process writes.
        stops_together: whether interrupts are recorded, so that all processes stop after the same step.
        captures_graphs: whether a training step can be captured as a CUDA graph.
    """

    accelerator: Accelerator
    collective: bool
    stops_together: bool
    captures_graphs: bool

    def check_model(self, model: nn.Module) -> None:
        """Check that the model can be trained this way. Raises: ValueError: it cannot."""

    def place(self, host: nn.Module) -> None:
        """Place the host before the teacher is copied from it."""

    def new_teacher(self, host: nn.Module, trained: set[str]) -> nn.Module:
        """Copy of the host as the teacher. trained: names of the parameters that the student changes."""

    def shard(self, host: nn.Module, alone: Iterable[str]) -> None:
        """Shard the student's parameters, in place, once its layers are converted.

        Args: alone: names of modules that are also called directly, outside their block's forward pass.
        """

    def prepare(self, host: nn.Module, called: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Prepare a stage. called: the host, or a module around it. Returns: what the stage calls, its optimizer."""

    def finish_stage(self, model: Any) -> None:
        """Undo :meth:`prepare`. model: its first result."""

    def free_gathered(self, host: nn.Module) -> None:
        """Free parameters that stayed gathered after a forward pass without a backward pass."""

    def drawing(self, host: nn.Module) -> AbstractContextManager[Any]:
        """Context for pipeline calls with the host during training."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Context with the mixed precision of the request."""

    def micro_batch(self, host: nn.Module, model: Any, last: bool) -> AbstractContextManager[Any]:
        """Context for forward and backward pass of a micro-batch. last: whether it is the last one of its step."""

    def clip_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients that accelerate does not, and clip the norm of all to 1."""

    def gather(self, values: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Gather full tensors on the CPU by name; every process must call it. keep: False: return nothing."""

    def local(self, value: Tensor, like: Tensor) -> Tensor:
        """This process's part of a full tensor, split like ``like``."""

    def optimizer_state(self, optimizer: Any, keep: bool) -> dict[str, Any]:
        """State of the optimizer for a checkpoint; every process must call it. keep: as in :meth:`gather`."""

    def check_optimizer_state(self, state: Mapping[str, Any], out: Path) -> None:
        """Check the format of a result of :meth:`optimizer_state`. Raises: BadInput: it is another one's."""

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Load a result of :meth:`optimizer_state`; parameters must be restored before."""


def check_origin(state: Mapping[str, Any], out: Path, deepspeed: bool) -> None:
    """Check that a checkpoint's optimizer state was written with, or without, DeepSpeed.

    Raises: BadInput: it was not.
    """
    if ("parts" in state) != deepspeed:
        how = "without" if deepspeed else "with"
        raise BadInput(
            f"the checkpoint in {out} was written {how} DeepSpeed: resume {how} DeepSpeed, or choose another --out"
        )
