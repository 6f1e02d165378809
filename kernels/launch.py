"""Helpers for launching Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiling import Tiling

__all__ = [
    "Boxes",
    "box_descriptors",
    "cdiv",
    "check_contiguous",
    "empty_rows",
    "exact_products",
    "has_large_shared_memory",
    "next_pow2_min16",
    "next_power_of_2",
    "register_limit",
    "shared_memory",
]

Boxes = tuple[TensorDescriptor, TensorDescriptor, str]

HOPPER_SHARED = 227 * 1024


def cdiv(n: int, step: int) -> int:
    """n / step, rounded up. Triton's own takes 7 µs, because it can also be called inside a kernel."""
    return -(-n // step)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n > 0; as fast as :func:`cdiv`."""
    return 1 << (n - 1).bit_length()


def check_contiguous(**tensors: Tensor | None) -> None:
    """Check tensors that a kernel addresses without their strides; 0.2 µs per tensor.

    Raises: ValueError: a tensor is not contiguous.
    """
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got shape {tuple(x.shape)} with strides {x.stride()}: "
                "the kernel does not read its strides, so pass .contiguous()"
            )


def register_limit(like: Tensor, registers: int | None) -> dict[str, int]:
    """Launch option for a maximum number of registers per thread; supported by NVIDIA's compiler only."""
    limited = registers is not None and like.device.type == "cuda" and torch.version.hip is None
    return {"maxnreg": registers} if limited else {}  # type: ignore[dict-item]


def shared_memory(like: Tensor) -> int:
    """Bytes of shared memory available to a program on the tensor's GPU; those of an H100 without a GPU, for offline
    compilation."""
    if like.device.type != "cuda":
        return HOPPER_SHARED
    properties = torch.cuda.get_device_properties(like.device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def has_large_shared_memory(like: Tensor) -> bool:
    """Whether Hopper's shared memory, 227 KiB, is available to a program."""
    return shared_memory(like) >= HOPPER_SHARED


def exact_products() -> str:
    """Precision of products with float32 accuracy: three TF32 products on NVIDIA's matrix units; float32 on AMD's, for
    which Triton does not implement tf32x3."""
    return "ieee" if torch.version.hip else "tf32x3"


def empty_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized (B, H, S, D), dense in the order (B, S, H, D)."""
    batch, heads, length, dim = x.shape
    return torch.empty(batch, length, heads, dim, dtype=dtype or x.dtype, device=x.device).transpose(1, 2)


def next_pow2_min16(n: int) -> int:
    """Smallest power of two that is at least n and that a matrix product accepts."""
    return max(16, next_power_of_2(n))


def box_descriptors(key: Tensor, value: Tensor, tiling: Tiling, before: int, rows: int | None = None) -> Boxes | None:
    """Tensor descriptors that load tiles of the grid's keys and values, and the BOXES mode of
    ``tiling_kernel.load_box``: whether batch elements and heads are "one axis" or "two axes".

    None if tiles must be loaded by pointers: a descriptor has at most five axes, strides in multiples of 16 bytes, and
    blocks of powers of two. (It cannot skip masked rows either, which may contain NaN.) ``rows``: tokens per load.
    """
    rows = tiling.volume if rows is None else rows
    if not _has_descriptors(key) or any(n != next_power_of_2(n) for n in (*tiling.box, key.shape[-1])):
        return None
    if not 16 <= rows <= tiling.volume or key.shape[-1] < 16:
        return None
    sides = _first_rows(tiling.box, rows)
    batch, heads, _, dim = key.shape
    g0, g1, g2 = tiling.grid
    in_one = batch == 1 or all(x.stride(0) == heads * x.stride(1) for x in (key, value))  # one axis for both
    if not in_one and g0 > 1:
        return None
    found = []
    for x in (key, value):
        sb, sh, sr, _ = x.stride()
        steps = (g1 * g2 * sr, g2 * sr, sr, 1)
        if in_one:
            shape, strides, box = (batch * heads, *tiling.grid, dim), (sh, *steps), (1, *sides, dim)
        else:
            shape, strides, box = (batch, heads, g1, g2, dim), (sb, sh, *steps[1:]), (1, 1, *sides[1:], dim)
        base = x[:, :, before:]
        if any(s * x.element_size() % 16 for s in strides[:-1]) or base.data_ptr() % 16:
            return None
        found.append(TensorDescriptor(base, list(shape), list(strides), list(box)))
    return found[0], found[1], "one axis" if in_one else "two axes"


def _first_rows(box: tuple[int, int, int], rows: int) -> tuple[int, ...]:
    """Sides of the first ``rows`` tokens of a box; both volumes are powers of two."""
    sides = list(box)
    for i in range(3):
        while sides[0] * sides[1] * sides[2] > rows and sides[i] > 1:
            sides[i] //= 2
    return tuple(sides)


def _has_descriptors(x: Tensor) -> bool:
    """Whether the GPU supports tensor descriptors in hardware: NVIDIA's from Hopper on."""
    if x.device.type != "cuda":
        return True  # Triton's interpreter, or offline compilation
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9
