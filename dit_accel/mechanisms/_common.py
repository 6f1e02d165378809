"""Shared by the mechanisms: checks of public arguments, and the dense parts around a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.reference import Tiles, every_key
from dit_accel.layout import TokenLayout

__all__ = [
    "as_tuple",
    "check_layout_and_scale",
    "check_learned",
    "check_number",
    "check_positive_int",
    "check_tensors",
    "flat_layout",
    "global_index",
    "global_logits",
    "global_rows",
    "global_tiles",
    "mask_bias",
    "per_axis",
    "repeated",
    "softmax_rows",
    "zero_masked",
]

T = TypeVar("T")


def check_tensors(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
    """Raises: TypeError, ValueError: tensors not (B, H, S, D) of one shape, dtype and device, or a bad mask."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor of shape (B, H, S, D), got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape (B, H, S, D), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, got {x.dtype}: convert it first")
    for name, x in (("key", key), ("value", value)):
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device} but query on {query.device}: move them to one device")
        if x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype} but query {query.dtype}: convert them to one dtype")
        if x.shape[-1] != query.shape[-1]:
            raise ValueError(f"{name} has head dim {x.shape[-1]} but query {query.shape[-1]}: they must be equal")
        if x.shape != query.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} but query {tuple(query.shape)}: all three must have "
                "one shape (repeat the heads of grouped keys first)"
            )
    if key_mask is None:
        return
    expected = (query.shape[0], query.shape[2])
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        kind = getattr(key_mask, "dtype", type(key_mask).__name__)
        raise TypeError(f"key_mask must be a bool tensor, True = attend, got {kind}")
    if tuple(key_mask.shape) != expected:
        raise ValueError(f"key_mask must have shape (B, S) = {expected}, got {tuple(key_mask.shape)}")
    if key_mask.device != query.device:
        raise ValueError(f"key_mask is on {key_mask.device} but query on {query.device}: move it there")


def check_layout_and_scale(layout: object, scale: object, *, default: bool = False) -> None:
    """Check layout and scale; ``default``: whether the layout may be None.

    Raises: TypeError, ValueError: not a layout, or not a finite number.
    """
    if not (isinstance(layout, TokenLayout) or (default and layout is None)):
        raise TypeError(f"layout must be a TokenLayout such as TokenLayout((64, 64)), got {layout!r}")
    if scale is not None and not math.isfinite(check_number("scale", scale)):
        raise ValueError(f"scale must be finite, got {scale}")


def check_learned(name: str, x: Tensor | None, shape: tuple[int, ...], query: Tensor) -> None:
    """Raises: TypeError, ValueError: a learned tensor of another shape or device."""
    if x is None:
        return
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor of shape {shape} or None, got {type(x).__name__}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.device != query.device:
        raise ValueError(f"{name} is on {x.device} but query on {query.device}: move it there")


def check_positive_int(name: str, value: object, least: int = 1) -> None:
    """Raises: TypeError, ValueError: not an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: object) -> float:
    """Raises: TypeError, ValueError: not a number, or NaN."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be a number that a float can hold, got a larger integer") from error
    if math.isnan(number):
        raise ValueError(f"{name} must be a number, got NaN")
    return number


def per_axis(name: str, value: T | Sequence[T], layout: TokenLayout) -> tuple[T, ...]:
    """One value per axis; a single value is used for all axes.

    Raises: ValueError: another number of values than axes.
    """
    values: tuple[T, ...] = tuple(value) if isinstance(value, (list, tuple)) else (value,)  # type: ignore[assignment]
    axes = len(layout.grid)
    if len(values) == 1:
        values = values * axes
    if len(values) != axes:
        raise ValueError(
            f"{name} {values} has {len(values)} values but grid {layout.grid} has {axes} axes: "
            "give one value, or one per axis"
        )
    return values


def repeated(value: Any, axes: int) -> tuple[Any, ...]:
    """One value per axis; a single value, or a tuple of one, is repeated for all axes."""
    values = as_tuple(value)
    return values * axes if len(values) == 1 else values


def as_tuple(value: T | Sequence[T]) -> tuple[T, ...]:
    """Wrap a single value in a tuple."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)  # type: ignore[return-value]


def flat_layout(layout: TokenLayout | None, query: Tensor) -> TokenLayout:
    """The layout, or the whole sequence as a 1-D grid if it is None."""
    return TokenLayout((query.shape[2],)) if layout is None else layout


def global_rows(layout: TokenLayout) -> tuple[tuple[int, int], ...]:
    """Ranges of the global tokens."""
    spans = ((0, layout.before), (layout.grid_slice.stop, layout.seq_len))
    return tuple(span for span in spans if span[0] < span[1])


def global_index(layout: TokenLayout, device: torch.device) -> Tensor:
    """Indices of the global tokens."""
    ranges = [torch.arange(*span, device=device) for span in global_rows(layout)]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64, device=device)


def global_tiles(layout: TokenLayout, device: torch.device) -> tuple[Tiles, ...]:
    """Tiles of the global tokens, which attend to every token."""
    index = global_index(layout, device)
    return (every_key(index, layout.seq_len),) if len(index) else ()


def zero_masked(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Zero the masked keys of (B, H, S, D): NaN in the padding would survive a product with zero."""
    return x if key_mask is None else torch.where(key_mask[:, None, :, None], x, 0)


def mask_bias(key_mask: Tensor | None) -> Tensor | None:
    """Bias of the logits, (B, S) float32: -inf for masked keys."""
    if key_mask is None:
        return None
    return torch.zeros(key_mask.shape, device=key_mask.device).masked_fill(~key_mask, -torch.inf)


def softmax_rows(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible keys, 0 for a row without one; used by the references."""
    logits = logits.masked_fill(~visible, -torch.inf)
    nonempty = visible.any(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(~nonempty, 0), -1).masked_fill(~nonempty, 0)


def global_logits(layout: TokenLayout) -> float:
    """Number of logits in the rows and columns of the global tokens."""
    n_global = layout.before + layout.after
    return float(n_global * n_global + 2 * n_global * layout.grid_len)
