"""Generalized neighborhood attention: windows with strides and dilation on 1-, 2- and 3-D grids (arXiv 2504.16922)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.windows.geometry import NeighborhoodAxis
from dit_accel.layout import TokenLayout
from dit_accel.mechanisms.backend import BACKENDS, check_backend

from ._common import (
    as_tuple,
    check_layout_and_scale,
    check_positive_int,
    check_tensors,
    global_logits,
    per_axis,
    softmax_rows,
    zero_masked,
)
from ._operator import check_no_tangents, define_operator
from ._windows import window_attention, window_attention_backward

__all__ = ["check_options", "count_logits", "fit", "gna_attention", "reference"]

Ints = int | Sequence[int]


def gna_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    *,
    window: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: bool | Sequence[bool] = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Generalized neighborhood attention. [arXiv 2504.16922]

    Along each axis a query attends to ``window`` keys around the leader of its group of ``stride`` tokens, moved
    inwards at the edges; with ``dilation`` d to every d-th token only. Global tokens attend to all tokens, and all to
    them.

    Args:
        query, key, value: (B, H, S, D), any floating dtype, any strides.
        layout: position of the grid in the sequence.
        window: number of keys along an axis, or one per axis.
        stride: number of neighbouring queries that share a window, or one per axis; at most the window.
        dilation: distance between the keys of a window, or one per axis; 1 = neighbours.
        is_causal: whether keys after the query along the axis are excluded, or one per axis.
        key_mask: (B, S) bool, True = attend.
        scale: factor on the logits; default D**-0.5.
        backend: "torch", "triton" or "flex"; None = the environment's DIT_ACCEL_BACKEND, else Triton on a GPU.
    Returns: (B, H, S, D) in query.dtype; a row without a visible key is 0.
    Raises: ValueError: a window larger than its axis, a stride larger than the window, wrong number of axes, a layout
        that does not match, tensors that do not match each other.
    """
    options = {"window": window, "stride": stride, "dilation": dilation, "is_causal": is_causal}
    return _attend(
        query,
        key,
        value,
        layout,
        key_mask=key_mask,
        scale=scale,
        backend=backend,
        fit=False,
        **options,  # type: ignore[arg-type]
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    fit: bool = False,
    backend: str | None = None,
    window: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Tensor:
    """:func:`gna_attention`; ``fit`` first shrinks the options to the layout."""
    if not torch.compiler.is_compiling():
        check_tensors(query, key, value, key_mask)
        check_layout_and_scale(layout, scale)
        check_options(window=window, stride=stride, dilation=dilation, is_causal=is_causal, backend=backend)
    check_no_tangents("gna", query, key, value)
    lists = [list(as_tuple(x)) for x in (window, stride, dilation, is_causal)]
    return torch.ops.dit_accel.gna_attention(
        query, key, value, key_mask, list(layout.grid), layout.before, layout.after, *lists, scale, fit, backend
    )[0]


def check_options(
    *,
    window: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: bool | Sequence[bool] = False,
    backend: str | None = None,
) -> None:
    """Raises: TypeError, ValueError: an option that is invalid for every layout."""
    check_backend(backend)
    values: dict[str, tuple[Any, ...]] = {}
    for name, value in (("window", window), ("stride", stride), ("dilation", dilation)):
        values[name] = as_tuple(value)
        if not values[name]:
            raise ValueError(f"{name} must be an int or one per axis, got {value!r}")
        for x in values[name]:
            check_positive_int(name, x)
    values["is_causal"] = as_tuple(is_causal)
    if not values["is_causal"] or not all(isinstance(x, bool) for x in values["is_causal"]):
        raise TypeError(f"is_causal must be True or False, or one per axis, got {is_causal!r}")
    axes = max(len(x) for x in values.values())
    for name, x in values.items():
        if axes > 3 or len(x) not in (1, axes):
            raise ValueError(
                f"{name} has {len(x)} values where another option has {axes}: give one value, or one per axis"
            )
    for w, s in zip(*(x * (axes // len(x)) for x in (values["window"], values["stride"])), strict=True):
        if s > w:
            raise ValueError(f"stride {s} is larger than window {w}: tokens would lie outside their own windows")


def fit(
    layout: TokenLayout, *, window: Ints, stride: Ints = 1, dilation: Ints = 1, is_causal: bool | Sequence[bool] = False
) -> dict[str, Any]:
    """Options for this layout, one per axis: the window shrunk to its axis, the stride to the window, the dilation to
    the largest that leaves a full window.

    Raises: ValueError: another number of values than axes.
    """
    windows = [min(w, n) for w, n in zip(per_axis("window", window, layout), layout.grid, strict=True)]
    strides = [min(s, w) for s, w in zip(per_axis("stride", stride, layout), windows, strict=True)]
    dilations = [
        min(d, n // w) for d, n, w in zip(per_axis("dilation", dilation, layout), layout.grid, windows, strict=True)
    ]
    return {
        "window": tuple(windows),
        "stride": tuple(strides),
        "dilation": tuple(dilations),
        "is_causal": per_axis("is_causal", is_causal, layout),
    }


def count_logits(
    layout: TokenLayout, *, window: Ints, stride: Ints = 1, dilation: Ints = 1, is_causal: bool | Sequence[bool] = False
) -> float:
    """Logits per batch element and head, global tokens included; dense would be ``seq_len ** 2``."""
    axes = _axes(layout, window=window, stride=stride, dilation=dilation, is_causal=is_causal)
    geometries = [axis.geometry() for axis in axes]
    return math.prod(float((g.last - g.first + 1).sum()) for g in geometries) + global_logits(layout)


def _axes(
    layout: TokenLayout, *, window: Ints, stride: Ints, dilation: Ints, is_causal: Any
) -> tuple[NeighborhoodAxis, ...]:
    """Raises: ValueError: options that are invalid for this layout."""
    names = ("window", "stride", "dilation", "is_causal")
    columns = [per_axis(n, x, layout) for n, x in zip(names, (window, stride, dilation, is_causal), strict=True)]
    axes = tuple(NeighborhoodAxis(*values) for values in zip(layout.grid, *columns, strict=True))
    for i, axis in enumerate(axes):
        if axis.window > axis.length:
            raise ValueError(
                f"window {axis.window} is larger than axis {i} of grid {layout.grid}: use at most {axis.length} there"
            )
        if axis.stride > axis.window:
            raise ValueError(
                f"stride {axis.stride} is larger than window {axis.window} on axis {i}: use at most the window"
            )
        if axis.window * axis.dilation > axis.length:
            raise ValueError(
                f"window {axis.window} with dilation {axis.dilation} spans {axis.window * axis.dilation} tokens, more "
                f"than axis {i} of grid {layout.grid}: use a dilation of at most {axis.length // axis.window}"
            )
    return axes


def _compute(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    *,
    layout: TokenLayout,
    scale: float,
    **options: Any,
) -> Any:
    axes = _axes(layout, **options)
    return window_attention(backend, query, key, value, key_mask, axes, 1.0, layout, scale)


def _backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    *,
    layout: TokenLayout,
    scale: float,
    **options: Any,
) -> Sequence[Tensor]:
    axes = _axes(layout, **options)
    return window_attention_backward(
        grad, out, lse, query, key, value, key_mask, axes, 1.0, layout, scale
    )[:3]  # fmt: skip


_COMPUTE: dict[str, Callable[..., Any]] = {backend: partial(_compute, backend) for backend in BACKENDS}

define_operator(
    "gna_attention",
    _COMPUTE,
    fit,
    learned=(),
    options="int[] window, int[] stride, int[] dilation, bool[] is_causal",
    backward={"triton": _backward},
)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    *,
    window: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: bool | Sequence[bool] = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`gna_attention` through the full (S, S) weights: slow; the specification."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    columns = [per_axis("option", x, layout) for x in (window, stride, dilation, is_causal)]
    grid_visible = torch.ones(1, 1, dtype=torch.bool)
    for n, w, s, d, causal in zip(layout.grid, *columns, strict=True):
        along = torch.tensor([[_is_visible(x, y, n, w, s, d, causal) for y in range(n)] for x in range(n)])
        grid_visible = torch.kron(grid_visible, along)
    visible = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool)
    visible[layout.grid_slice, layout.grid_slice] = grid_visible
    visible = visible.to(query.device)[None, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    acc = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(acc) for x in (query, zero_masked(key, key_mask), zero_masked(value, key_mask)))
    return (softmax_rows(q @ k.mT * scale, visible.expand(len(q), 1, -1, -1)) @ v).to(query.dtype)


def _is_visible(x: int, y: int, n: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """Whether the query at x attends to the key at y on an axis of n tokens."""
    if x % dilation != y % dilation:
        return False
    i, j = x // dilation, y // dilation
    last = len(range(x % dilation, n, dilation)) - 1
    if causal:
        leader = min(i // stride * stride + stride - 1, last)
        return j <= i and leader - j < window
    left, right = window // 2, window // 2 + window % 2 - 1
    leader = min(i // stride * stride + stride // 2, last)
    centre = max(left, min(leader, last - right))
    return centre - left <= j <= centre + right
