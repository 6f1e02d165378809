"""What launches of Triton kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["register_limit"]


def register_limit(like: Tensor, registers: int | None) -> dict[str, int]:
    """Launch option for at most so many registers a thread; NVIDIA's compiler alone knows it."""
    limited = registers is not None and like.device.type == "cuda" and torch.version.hip is None
    return {"maxnreg": registers} if limited else {}  # type: ignore[dict-item]
