"""Choice of the implementation of :class:`.protocol.Parallel` for a launch, and checks before any work."""

from __future__ import annotations

from accelerate import Accelerator

from . import fsdp, zero
from .plain import Plain
from .protocol import Parallel

__all__ = ["check_launch", "new_parallel"]


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
