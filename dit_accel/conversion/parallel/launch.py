"""Choice of the implementation of :class:`.protocol.Parallel` for a launch, and checks before any work."""

from __future__ import annotations

from accelerate import Accelerator

from ..request import Request
from . import fsdp, zero
from .plain import Plain
from .protocol import Parallel

__all__ = ["check_graph", "check_launch", "new_parallel"]


def check_launch(mixed_precision: str, selects: bool) -> None:
    """Check accelerate's configuration before accelerate starts.

    Args: selects: whether the recipe selects layers.
    Raises: ValueError: a setting or option that ``convert`` does not support.
    """
    fsdp.check_launch(mixed_precision)
    zero.check_zero(mixed_precision, selects)


def new_parallel(accelerator: Accelerator, batch: int, mixed_precision: str) -> Parallel:
    """Complete accelerate's configuration and return the implementation for it.

    Args: batch: samples per process and micro-batch.
    Raises: ValueError: a setting that ``convert`` does not support.
    """
    fsdp.set_up(accelerator)
    zero.set_up_zero(accelerator, batch, mixed_precision)
    if fsdp.is_sharded(accelerator):
        return fsdp.Fsdp(accelerator)
    return zero.Zero(accelerator, mixed_precision) if zero.is_zero(accelerator) else Plain(accelerator)


def check_graph(request: Request, parallel: Parallel) -> None:
    """Check the options that a captured training step does not support; does nothing without ``--cuda-graph``.

    Raises: ValueError: there is no CUDA GPU, or an option that does not work in a CUDA graph.
    """
    if not request.cuda_graph:
        return
    device = parallel.accelerator.device
    if device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a CUDA GPU, accelerate found {device}: leave it out")
    if not parallel.captures_graphs or request.gradient_checkpointing or request.mixed_precision == "fp16":
        raise ValueError(
            "--cuda-graph needs one process without DeepSpeed, --mixed-precision no or bf16, and no "
            "--gradient-checkpointing: change these options, or leave --cuda-graph out"
        )
