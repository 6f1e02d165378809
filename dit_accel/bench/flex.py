"""Static masks for torch's FlexAttention, written independently of the mechanisms: to time FlexAttention and to check
the output of the timed calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .timing import time_calls, time_once

__all__ = ["check_rows", "reference_mask_mod", "time_flex"]

MaskMod = Callable[[Any, Any, Tensor, Tensor], Tensor]


def reference_mask_mod(case: Case) -> MaskMod | None:
    """FlexAttention ``mask_mod(batch, head, query, key)`` of a case, True = attend.

    None if the mask depends on the data (SLA, LLSA).
    """
    grid, before = case.layout.grid, case.layout.before
    if case.mechanism == "clear":
        radii = _per_axis(case.options["radius"], len(grid))
        on_grid = _clear_mask(grid, radii)
    elif case.mechanism == "gna":
        windows, strides = (_per_axis(case.options[name], len(grid)) for name in ("window", "stride"))
        on_grid = _gna_mask(grid, windows, strides)
    else:
        return None
    if not (before or case.layout.after):
        return lambda b, h, q, k: on_grid(q, k)
    end = before + math.prod(grid)

    def with_global_tokens(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
        is_global = (q < before) | (k < before) | (q >= end) | (k >= end)
        return is_global | on_grid(q - before, k - before)

    return with_global_tokens


def _per_axis(value: Any, axes: int) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,) * axes


def _coordinates(token: Tensor, grid: Sequence[int]) -> list[Tensor]:
    """Coordinates of tokens on the grid, one tensor per axis."""
    reversed_axes = []
    for length in reversed(grid):
        reversed_axes.append(token % length)
        token = token // length
    return reversed_axes[::-1]


def _clear_mask(grid: Sequence[int], radii: Sequence[float]) -> Callable[[Tensor, Tensor], Tensor]:
    """Mask Σ Δ² < radius², with one radius for all axes."""
    if len(set(radii)) != 1:
        raise ValueError(f"the FlexAttention reference needs the same radius on all axes, got {radii}")

    def mask(q: Tensor, k: Tensor) -> Tensor:
        square = torch.zeros_like(q - k)
        for a, b in zip(_coordinates(q, grid), _coordinates(k, grid), strict=True):
            square = square + (a - b) * (a - b)
        return square < radii[0] ** 2

    return mask


def _gna_mask(
    grid: Sequence[int], windows: Sequence[int], strides: Sequence[int]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Mask of a window around the leader of the query's group of ``stride``, shifted inwards at the edges."""

    def mask(q: Tensor, k: Tensor) -> Tensor:
        inside = (q == q) & (k == k)
        axes = zip(_coordinates(q, grid), _coordinates(k, grid), grid, windows, strides, strict=True)
        for i, j, n, window, stride in axes:
            left, right = window // 2, window // 2 + window % 2 - 1
            leader = (i // stride * stride + stride // 2).clamp(max=n - 1)
            centre = leader.clamp(left, n - 1 - right)
            inside = inside & (j >= centre - left) & (j <= centre + right)
        return inside

    return mask


def time_flex(case: Case, tensors: Sequence[Tensor], samples: int) -> dict[str, Any] | None:
    """Time compiled FlexAttention, and separately the construction of its block mask; None if the mask is not static.

    On the CPU, nothing is compiled.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask_mod = reference_mask_mod(case)
    if mask_mod is None:
        return None
    query, key, value = tensors
    device, length = query.device, query.shape[2]
    on_gpu = device.type == "cuda"

    def build() -> Any:
        return create_block_mask(mask_mod, None, None, length, length, device=device, _compile=on_gpu)

    build()
    block_mask, build_s = time_once(build, device)  # second call: the first one may have compiled
    attend = torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention
    attend(query, key, value, block_mask=block_mask)
    times = time_calls(lambda: attend(query, key, value, block_mask=block_mask), device, samples=samples)
    return {"mask_ms": build_s * 1e3, **times.as_row(), "visited": 1 - block_mask.sparsity() / 100}


def check_rows(case: Case, tensors: Sequence[Tensor], out: Tensor, rows: int = 64) -> dict[str, Any]:
    """Compare some query rows of an output with masked attention in float32, so that wrong results are not timed.

    If the mask depends on the data, only check that the output is finite.

    Raises: ArithmeticError: the output is wrong or not finite.
    """
    if not bool(torch.isfinite(out).all()):
        raise ArithmeticError(f"{case.name}: the output contains NaN or infinity")
    mask_mod = reference_mask_mod(case)
    if mask_mod is None:
        return {"rows": 0, "error": None}
    length = out.shape[2]
    generator = torch.Generator().manual_seed(0)
    sampled = torch.randperm(length, generator=generator)[:rows].sort().values.to(out.device)
    query, key, value = (x[0].float() for x in (tensors[0][:, :, sampled], tensors[1], tensors[2]))
    mask = mask_mod(0, 0, sampled[:, None], torch.arange(length, device=out.device)[None])
    logits = (query @ key.mT) * query.shape[-1] ** -0.5
    expected = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    error = float((out[0, :, sampled].float() - expected).abs().max())
    tolerance = (1e-4 if out.dtype == torch.float32 else 0.02) * float(expected.abs().max())
    if not error <= tolerance:
        raise ArithmeticError(f"{case.name}: largest error {error:.3g}, tolerance {tolerance:.3g}; not timed")
    return {"rows": len(sampled), "error": error}
