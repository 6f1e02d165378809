"""What ``dit-accel bench`` was asked for, and the checks that the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..environment import pick_device, pick_dtype
from ..errors import BadInput
from ..files import require_writable

__all__ = ["Request", "dense_attention", "make_request"]


@dataclass(frozen=True)
class Request:
    """Checked. ``names``: cases or models; empty: the default ones."""

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
    order: str = "tokens-first"
    flex: bool = False
    backward: bool = False
    checkpointing: bool = False
    variants: tuple[str, ...] = ()


def make_request(device: str | None, dtype: str | None, smoke: bool, out: Path, **rest: object) -> Request:
    """Raises: BadInput: no GPU and no ``--smoke``, an unknown device or precision, a folder that cannot be written."""
    try:
        where = pick_device(device)
        precision = pick_dtype(dtype, where)
        require_writable(out.parent)
    except ValueError as error:
        raise BadInput(str(error)) from None
    if where.type != "cuda" and not smoke:
        raise BadInput(
            f"bench needs a CUDA GPU; found {where.type} (--device cpu --smoke runs tiny sizes, whose figures mean "
            "nothing, to see that everything works)"
        )
    return Request(out=out, device=where, dtype=precision, smoke=smoke, **rest)  # type: ignore[arg-type]


def dense_name(device: torch.device) -> str:
    """What the dense attention is that we compare with."""
    if device.type == "cuda":
        return "cuDNN" if torch.version.hip is None else "torch SDPA (ROCm)"
    return f"torch SDPA ({device.type})"


@contextmanager
def dense_attention(device: torch.device, strict: bool = True) -> Iterator[str]:
    """Inside, softmax attention is cuDNN's on an NVIDIA GPU, torch's choice elsewhere; its name.

    ``strict``: nothing but cuDNN; else the others are there for calls that cuDNN does not take.
    """
    name = dense_name(device)
    if name != "cuDNN":
        yield name
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *([] if strict else others)], set_priority=True):
        yield name
