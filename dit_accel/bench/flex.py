"""Static windows for torch's FlexAttention, written from SPEC alone: a peer to time, and a check of what we time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .timing import time_calls, time_once

__all__ = ["check_rows", "mask_of", "time_flex"]

Mask = Callable[[Any, Any, Tensor, Tensor], Tensor]


def mask_of(case: Case) -> Mask | None:
    """``mask(batch, head, query, key)``: whether the key is seen. None where it depends on the data (SLA, LLSA)."""
    grid, before = case.layout.grid, case.layout.before
    if case.mechanism == "clear":
        radii = _each(case.options["radius"], len(grid))
        on_grid = _circle(grid, radii)
    elif case.mechanism == "gna":
        windows, strides = (_each(case.options[name], len(grid)) for name in ("window", "stride"))
        on_grid = _neighborhood(grid, windows, strides)
    else:
        return None
    if not (before or case.layout.after):
        return lambda b, h, q, k: on_grid(q, k)
    end = before + math.prod(grid)

    def with_text(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
        text = (q < before) | (k < before) | (q >= end) | (k >= end)
        return text | on_grid(q - before, k - before)

    return with_text


def _each(value: Any, axes: int) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,) * axes


def _coordinates(token: Tensor, grid: Sequence[int]) -> list[Tensor]:
    places = []
    for length in reversed(grid):
        places.append(token % length)
        token = token // length
    return places[::-1]


def _circle(grid: Sequence[int], radii: Sequence[float]) -> Callable[[Tensor, Tensor], Tensor]:
    """Σ Δ² < radius², one radius for all axes."""
    if len(set(radii)) != 1:
        raise ValueError(f"the FlexAttention peer has one radius for all axes, got {radii}")

    def seen(q: Tensor, k: Tensor) -> Tensor:
        square = torch.zeros_like(q - k)
        for a, b in zip(_coordinates(q, grid), _coordinates(k, grid), strict=True):
            square = square + (a - b) * (a - b)
        return square < radii[0] ** 2

    return seen


def _neighborhood(
    grid: Sequence[int], windows: Sequence[int], strides: Sequence[int]
) -> Callable[[Tensor, Tensor], Tensor]:
    """A window around the leader of the query's group of ``stride``, moved inwards at the edges."""

    def seen(q: Tensor, k: Tensor) -> Tensor:
        visible = (q == q) & (k == k)
        places = zip(_coordinates(q, grid), _coordinates(k, grid), grid, windows, strides, strict=True)
        for i, j, n, window, stride in places:
            left, right = window // 2, window // 2 + window % 2 - 1
            leader = (i // stride * stride + stride // 2).clamp(max=n - 1)
            centre = leader.clamp(left, n - 1 - right)
            visible = visible & (j >= centre - left) & (j <= centre + right)
        return visible

    return seen


def time_flex(case: Case, tensors: Sequence[Tensor], samples: int) -> dict[str, Any] | None:
    """Milliseconds of compiled FlexAttention, and of making its block mask, which is by itself; None without a mask.

    On the CPU nothing is compiled.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = mask_of(case)
    if mask is None:
        return None
    query, key, value = tensors
    device, length = query.device, query.shape[2]
    on_gpu = device.type == "cuda"

    def build() -> Any:
        return create_block_mask(mask, None, None, length, length, device=device, _compile=on_gpu)

    build()
    blocks, build_s = time_once(build, device)  # once more: the first time may have compiled
    attend = torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention
    attend(query, key, value, block_mask=blocks)
    times = time_calls(lambda: attend(query, key, value, block_mask=blocks), device, samples=samples)
    return {"mask_ms": build_s * 1e3, **times.as_row(), "visited": 1 - blocks.sparsity() / 100}


def check_rows(case: Case, tensors: Sequence[Tensor], out: Tensor, rows: int = 64) -> dict[str, Any]:
    """Compare some query rows of an output with float32 attention under the mask; no speed of a wrong result.

    Where the mask depends on the data, only that the output is finite.

    Raises: ArithmeticError: wrong, or not finite.
    """
    if not bool(torch.isfinite(out).all()):
        raise ArithmeticError(f"{case.name}: the output holds NaN or infinity")
    mask = mask_of(case)
    if mask is None:
        return {"rows": 0, "error": None}
    length = out.shape[2]
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(length, generator=generator)[:rows].sort().values.to(out.device)
    query, key, value = (x[0].float() for x in (tensors[0][:, :, places], tensors[1], tensors[2]))
    visible = mask(0, 0, places[:, None], torch.arange(length, device=out.device)[None])
    logits = (query @ key.mT) * query.shape[-1] ** -0.5
    want = logits.masked_fill(~visible, -torch.inf).softmax(-1) @ value
    error = float((out[0, :, places].float() - want).abs().max())
    allowed = (1e-4 if out.dtype == torch.float32 else 0.02) * float(want.abs().max())
    if not error <= allowed:
        raise ArithmeticError(f"{case.name}: rows are off by {error:.3g} (allowed {allowed:.3g}): not timed")
    return {"rows": len(places), "error": error}
