"""Generalized neighborhood attention: windows with strides and dilation on 1-, 2- and 3-D grids (arXiv 2504.16922)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel.kernels.windows.geometry import NeighborhoodAxis
from dit_accel.layout import TokenLayout

from ._common import (
    as_tuple,
    check_positive_int,
    global_logits,
    per_axis,
    repeated,
    softmax_rows,
    zero_masked,
)
from ._controls import Control
from ._inputs import AttentionInputs
from ._search import SearchSpace, axis_sizes
from ._windows import window_attention, window_attention_backward
from ._workloads import HUNYUAN_720P, Workload
from .backend import BACKENDS
from .processor import AcceleratedAttnProcessor
from .registry import attention_function, reference_function, register_processor

__all__ = ["GNAAttnProcessor", "gna_attention", "reference"]


@register_processor
@dataclass(frozen=True, kw_only=True)
class GNAAttnProcessor(AcceleratedAttnProcessor):
    """Generalized neighborhood attention. [GNA, arXiv 2504.16922]

    Along each axis a query attends to ``window`` keys around the leader of its group of ``stride`` tokens, moved
    inwards at the edges; with ``dilation`` d to every d-th token only. Global tokens attend to all tokens, and all to
    them.

    Args:
        window: number of keys along an axis, or one per axis.
        stride: number of neighbouring queries that share a window, or one per axis; at most the window.
        dilation: distance between the keys of a window, or one per axis; 1 = neighbours.
        is_causal: whether keys after the query along the axis are excluded, or one per axis.
    """

    window: int | Sequence[int]
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1
    is_causal: bool | Sequence[bool] = False

    name: ClassVar[str] = "gna"
    label: ClassVar[str] = "GNA"
    summary: ClassVar[str] = "sliding window with a stride"
    paper: ClassVar[str] = "arXiv 2504.16922"
    backends: ClassVar[tuple[str, ...]] = BACKENDS
    backward_backends: ClassVar[tuple[str, ...]] = ("triton",)
    needs_layout: ClassVar[bool] = True

    workloads: ClassVar[tuple[Workload, ...]] = (
        Workload(
            "gna-hunyuan", "GNA 18×24×24, stride 16×8×8, Hunyuan", 24, 128, HUNYUAN_720P,
            {"window": (18, 24, 24), "stride": (16, 8, 8)}, {"forward": 9.7, "backward": 6.0},
        ),
        Workload(
            "gna-flux-256", "GNA 80², stride 16², Flux 256×256", 24, 128, TokenLayout((256, 256)),
            {"window": 80, "stride": 16}, {"forward": 9.2},
        ),
    )  # fmt: skip
    comparison_grid: ClassVar[tuple[int, ...]] = (20, 32, 32)

    def check(self) -> None:
        values: dict[str, tuple[Any, ...]] = {}
        for name, value in (("window", self.window), ("stride", self.stride), ("dilation", self.dilation)):
            values[name] = as_tuple(value)
            if not values[name]:
                raise ValueError(f"{name} must be an int or one per axis, got {value!r}")
            for x in values[name]:
                check_positive_int(name, x)
        values["is_causal"] = as_tuple(self.is_causal)
        if not values["is_causal"] or not all(isinstance(x, bool) for x in values["is_causal"]):
            raise TypeError(f"is_causal must be True or False, or one per axis, got {self.is_causal!r}")
        axes = max(len(x) for x in values.values())
        for name, x in values.items():
            if axes > 3 or len(x) not in (1, axes):
                raise ValueError(
                    f"{name} has {len(x)} values where another option has {axes}: give one value, or one per axis"
                )
        for w, s in zip(*(x * (axes // len(x)) for x in (values["window"], values["stride"])), strict=True):
            if s > w:
                raise ValueError(f"stride {s} is larger than window {w}: tokens would lie outside their own windows")

    def fit(self, layout: TokenLayout) -> GNAAttnProcessor:
        """Cap the window to its axis, the stride to the window, the dilation to the largest that leaves a full window.

        Raises: ValueError: another number of values than axes.
        """
        grid = layout.grid
        windows = [min(w, n) for w, n in zip(per_axis("window", self.window, layout), grid, strict=True)]
        strides = [min(s, w) for s, w in zip(per_axis("stride", self.stride, layout), windows, strict=True)]
        dilations = [
            min(d, n // w) for d, n, w in zip(per_axis("dilation", self.dilation, layout), grid, windows, strict=True)
        ]
        causal = per_axis("is_causal", self.is_causal, layout)
        return replace(
            self, window=tuple(windows), stride=tuple(strides), dilation=tuple(dilations), is_causal=causal
        )  # fmt: skip

    def count_logits(self, layout: TokenLayout) -> float:
        geometries = [axis.geometry() for axis in self._axes(layout)]
        return math.prod(float((g.last - g.first + 1).sum()) for g in geometries) + global_logits(layout)

    def compute(self, backend: str, inputs: AttentionInputs) -> Any:
        return window_attention(backend, inputs, self._axes(inputs.layout), 1.0)

    def backward(self, grad: Tensor, out: Tensor, lse: Tensor, inputs: AttentionInputs) -> Sequence[Tensor]:
        return window_attention_backward(grad, out, lse, inputs, self._axes(inputs.layout), 1.0)[:3]

    def dense_reference(self, inputs: AttentionInputs) -> Tensor:
        query, key, value, key_mask, _, layout, scale = inputs
        grid_visible = torch.ones(1, 1, dtype=torch.bool)
        for n, w, s, d, causal in self._by_axis(layout):
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

    def image_axis_options(self, axes: int, images: int) -> dict[str, Any]:
        leading = {"window": images, "stride": 1, "dilation": 1, "is_causal": False}
        return {name: (first, *repeated(getattr(self, name), axes)) for name, first in leading.items()}

    @classmethod
    def suggest(cls, grid: Sequence[int], share: float = 0.1) -> dict[str, Any]:
        """A window that covers this share of the grid, in the grid's proportions, and a stride of a fifth of the
        window; on 256×256 close to the paper's values for Flux (80 and 16)."""
        window = tuple(max(1, round(n * share ** (1 / len(grid)))) for n in grid)
        return {"window": window, "stride": tuple(max(1, n // 5) for n in window)}

    @classmethod
    def tiny_options(cls, options: Mapping[str, Any], grid: Sequence[int]) -> dict[str, Any]:
        return {"window": tuple(n // 2 for n in grid), "stride": tuple(n // 4 for n in grid)}

    @classmethod
    def search_space(cls, grid: Sequence[int]) -> SearchSpace:
        axes = axis_sizes(grid)
        return SearchSpace("window", axes, lambda *size: {"window": size}, lambda own: repeated(own.window, len(axes)))

    @classmethod
    def controls(cls, grid: Sequence[int]) -> tuple[Control, ...]:
        own, side = cls.suggest(grid), max(grid[-2:])
        controls = [
            Control(
                "window", "Window, in tokens", 1, side, own["window"][-1], 1, "Side of the square window of each token."
            ),
            Control(
                "stride", "Stride, in tokens", 1, side, own["stride"][-1], 1,
                "Number of neighbours that share one window; 1 = one window per token. At most the window.",
            ),
        ]  # fmt: skip
        if len(grid) == 3:
            label = "Window in time, in tokens"
            time = Control(
                "window_time", label, 1, max(grid[0], 2), own["window"][0], 1, "The same along the time axis."
            )
            controls.insert(1, time)
        return tuple(controls)

    @classmethod
    def from_controls(cls, values: Mapping[str, Any], axes: int) -> dict[str, Any]:
        window, stride = values["window"], values["stride"]
        if axes < 3:
            return {"window": (window,) * axes, "stride": (stride,) * axes}
        time = values["window_time"]
        return {"window": (time, window, window), "stride": (min(stride, time), stride, stride)}

    def _by_axis(self, layout: TokenLayout) -> list[tuple[int, int, int, int, bool]]:
        """Length, window, stride, dilation and causality of each axis.

        Raises: ValueError: another number of values than axes.
        """
        names = ("window", "stride", "dilation", "is_causal")
        columns = [per_axis(name, getattr(self, name), layout) for name in names]
        return list(zip(layout.grid, *columns, strict=True))

    def _axes(self, layout: TokenLayout) -> tuple[NeighborhoodAxis, ...]:
        """Raises: ValueError: options that do not suit this layout."""
        axes = tuple(NeighborhoodAxis(*values) for values in self._by_axis(layout))
        for i, axis in enumerate(axes):
            if axis.window > axis.length:
                raise ValueError(
                    f"window {axis.window} is larger than axis {i} of grid {layout.grid}: use at most {axis.length} "
                    "there"
                )
            if axis.stride > axis.window:
                raise ValueError(
                    f"stride {axis.stride} is larger than window {axis.window} on axis {i}: use at most the window"
                )
            if axis.window * axis.dilation > axis.length:
                raise ValueError(
                    f"window {axis.window} with dilation {axis.dilation} spans {axis.window * axis.dilation} tokens, "
                    f"more than axis {i} of grid {layout.grid}: use a dilation of at most {axis.length // axis.window}"
                )
        return axes


gna_attention = attention_function(GNAAttnProcessor)
reference = reference_function(GNAAttnProcessor)


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
