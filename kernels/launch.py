"""What launches of Triton kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["register_limit", "shared_memory"]

HOPPER_SHARED = 227 * 1024


def register_limit(like: Tensor, registers: int | None) -> dict[str, int]:
    """Launch option for at most so many registers a thread; NVIDIA's compiler alone knows it."""
    limited = registers is not None and like.device.type == "cuda" and torch.version.hip is None
    return {"maxnreg": registers} if limited else {}  # type: ignore[dict-item]


def shared_memory(like: Tensor) -> int:
    """Bytes of shared memory that a program may have on the tensor's GPU; without a GPU, when building for one, an
    H100's."""
    if like.device.type != "cuda":
        return HOPPER_SHARED
    properties = torch.cuda.get_device_properties(like.device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
