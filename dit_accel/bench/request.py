"""Options of a ``dit-accel bench`` run, their checks, and the dense attention to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.choices import Order, check_choice, check_count
from ..common.environment import pick_device, pick_dtype
from ..common.errors import BadInput, as_bad_input
from ..common.files import require_writable

__all__ = ["Request", "dense_attention", "make_request"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Checked options of a run. ``names``: cases or models; empty: the default ones.

    Raises: TypeError, ValueError: a value of the wrong type or out of range.
    """

    names: tuple[str, ...]
    out: Path
    device: torch.device
    dtype: torch.dtype
    repeats: int
    seed: int
    smoke: bool
    keep: Path | None
    command: tuple[str, ...]
    backends: tuple[str | None, ...] = (None,)
    order: Order = "tokens-first"
    flex: bool = False
    backward: bool = False
    checkpointing: bool = False
    variants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_count("--repeats", self.repeats)
        check_choice("--order", self.order, Order)


def make_request(device: str | None, dtype: str | None, smoke: bool, out: Path, **rest: object) -> Request:
    """Check the options.

    Raises: BadInput: no GPU and no ``--smoke``, an unknown device or precision, or an output folder that is not
    writable.
    """
    with as_bad_input():
        target = pick_device(device)
        precision = pick_dtype(dtype, target)
        require_writable(out.parent)
    if target.type != "cuda" and not smoke:
        raise BadInput(
            f"bench needs a CUDA GPU; found {target.type} (to test the installation, run tiny sizes with "
            "--device cpu --smoke; their timings mean nothing)"
        )
    with as_bad_input():
        return Request(out=out, device=target, dtype=precision, smoke=smoke, **rest)  # type: ignore[arg-type]


def dense_name(device: torch.device) -> str:
    """Name of the dense attention to compare with."""
    if device.type == "cuda":
        return "cuDNN" if torch.version.hip is None else "torch SDPA (ROCm)"
    return f"torch SDPA ({device.type})"


@contextmanager
def dense_attention(device: torch.device, strict: bool = True) -> Iterator[str]:
    """Context in which SDPA uses cuDNN on an NVIDIA GPU and torch's default elsewhere. Yields: the name.

    ``strict``: only cuDNN; if False, other backends compute the calls that cuDNN does not support.
    """
    name = dense_name(device)
    if name != "cuDNN":
        yield name
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *([] if strict else others)], set_priority=True):
        yield name
