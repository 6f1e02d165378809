"""Plots and overlays of the app, legible on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from dit_accel.mechanisms.registry import PROCESSORS

__all__ = [
    "coverage_figure",
    "label_axes",
    "label_of",
    "map_figure",
    "new_figure",
    "overlay",
    "overlay_scale",
    "speed_figure",
    "two_digits",
]  # fmt: skip

_DENSE = "dense"
_COLOURS = ("#2f7ed8", "#e08214", "#2a9d5c", "#9b5fc0", "#b23a6f", "#1f9aa5")  # of the mechanisms, in their order
_MARKS = ("o", "^", "D", "v", "P", "X")  # distinguishable without colours
_INK, _GRID = "#7b8290", "#7b829040"  # grey: legible on white and on black
_STATES = ("#7b829022", "#9ec5f0", "#1f5fae")  # left out, linear, critical
_PLACE = "#e4572e"
_MIN_PIXELS = 512
_HEAT = np.array([[13, 8, 60], [126, 3, 168], [204, 71, 120], [248, 149, 64], [252, 253, 150]], np.float32)


def label_of(attention: str) -> str:
    """Label of a mechanism, or of dense attention, by its name."""
    return "Dense" if attention == _DENSE else PROCESSORS[attention].label


def _style_of(attention: str) -> tuple[str, str]:
    """Colour and mark."""
    if attention == _DENSE:
        return "#7d838c", "s"
    place = list(PROCESSORS).index(attention)
    return _COLOURS[place % len(_COLOURS)], _MARKS[place % len(_MARKS)]


def new_figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.tick_params(which="both", colors=_INK, labelcolor=_INK, labelsize=9)
    return figure, axes


def label_axes(axes: Any, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x, color=_INK, fontsize=9)
    axes.set_ylabel(y, color=_INK, fontsize=9)
    axes.set_title(title, color=_INK, fontsize=9, loc="left")


def _add_title_and_legend(figure: Figure, title: str, columns: int) -> None:
    """Add a title above the axes and the legend below them."""
    figure.suptitle(title, color=_INK, fontsize=10, fontweight="bold", x=0.02, ha="left")
    figure.legend(fontsize=8.5, frameon=False, labelcolor=_INK, ncols=columns, loc="outside lower left")


def speed_figure(rows: Sequence[Mapping[str, Any]], points: Mapping[str, Any], subtitle: str) -> Figure:
    """Milliseconds per call against tokens, on logarithmic axes; a star marks each break-even with dense attention."""
    figure, axes = new_figure(9, 5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for name in (_DENSE, *PROCESSORS):
        colour, mark = _style_of(name)
        series = sorted(
            (row["tokens"], row["ms"], row["q1"], row["q3"])
            for row in rows
            if row["attention"] == name and row["status"] == "complete"
        )
        if series:
            tokens, ms, q1, q3 = zip(*series, strict=True)
            axes.fill_between(tokens, q1, q3, color=colour, alpha=0.2, linewidth=0)
            width = 3 if name == "dense" else 1.8
            axes.plot(tokens, ms, color=colour, marker=mark, markersize=5, lw=width, label=label_of(name))
    for name, point in points.items():
        _mark_break_even(axes, name, point)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(color=_GRID, linewidth=0.6)
    label_axes(axes, "tokens", "milliseconds per call", subtitle)
    if rows:
        axes.legend(fontsize=9, frameon=False, labelcolor=_INK, loc="upper left")
    return figure


def two_digits(number: float) -> int:
    """Round to two significant digits, the precision of an interpolated break-even."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return round(number / unit) * unit


def _mark_break_even(axes: Any, name: str, point: Any) -> None:
    """Mark the break-even with a star and a vertical line, if it lies between two measured sizes."""
    if point.tokens is None or point.slower is None:
        return
    colour = _style_of(name)[0]
    axes.plot([point.tokens], [point.ms], "*", color=colour, markersize=17, markeredgecolor="white", zorder=5)
    axes.axvline(point.tokens, color=colour, linestyle=":", linewidth=1.2)
    axes.annotate(
        f" {label_of(name)}: {two_digits(point.tokens):,}", (point.tokens, 0), xycoords=("data", "axes fraction"),
        rotation=90, ha="right", va="bottom", color=colour, fontsize=8,
    )  # fmt: skip


def coverage_figure(
    name: str, title: str, layers: Sequence[str], found: Sequence[Any], chosen: str, wide: bool
) -> Figure:
    """Bars: share of dense attention that the mechanism covers in each layer. The selected layer is opaque.

    A dashed line marks the share of uniform attention.
    """
    figure, axes = new_figure(*((9.5, 3.8) if wide else (8, 4.4)))
    places = range(len(layers))
    colour = _style_of(name)[0]
    alphas = [1.0 if layer == chosen else 0.45 for layer in layers]
    for place, one, alpha in zip(places, found, alphas, strict=True):
        axes.bar(place, 100 * one.mass, color=colour, alpha=alpha, width=0.7)
        axes.bar(place, 100 * one.on_global, color="none", edgecolor=_INK, hatch="////", width=0.7, linewidth=0)
        axes.text(place, 100 * one.mass + 1, f"{100 * one.mass:.0f}", ha="center", color=_INK, fontsize=8)
    if found:
        axes.axhline(100 * found[0].logits, color=_PLACE, linestyle="--", linewidth=1.2, label="uniform attention")
    axes.bar(0, 0, color=colour, label=f"covered by {label_of(name)}")
    if any(one.on_global > 0.005 for one in found):
        axes.bar(0, 0, color="none", edgecolor=_INK, hatch="////", label="of which on text", linewidth=0)
    axes.set_xticks(list(places), [str(place + 1) for place in places])
    axes.set_ylim(0, 108)
    axes.xaxis.set_major_locator(MaxNLocator(30, integer=True)) if len(layers) > 30 else None
    label_axes(axes, "layer", "% of dense attention")
    _add_title_and_legend(figure, title, columns=3)
    return figure


def map_figure(states: NDArray[np.int32], row: int) -> Figure:
    """Map of query blocks by key blocks; the row of the inspected token is marked."""
    figure, axes = new_figure(5.3, 4.4)
    axes.imshow(states, cmap=ListedColormap(_STATES), vmin=0, vmax=2, interpolation="nearest", aspect="auto")
    axes.axhline(row - 0.5, color=_PLACE, linewidth=0.8)
    axes.axhline(row + 0.5, color=_PLACE, linewidth=0.8)
    linear = bool((states == 1).any())
    words = ["left out", "linear", "critical"] if linear else ["not kept", "", "kept"]
    for colour, word in zip(reversed(_STATES), reversed(words), strict=True):
        if word:
            axes.plot([], [], "s", color=colour, markeredgecolor=_INK, markeredgewidth=0.5, label=word)
    axes.plot([], [], color=_PLACE, label="query token")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    label_axes(axes, "key blocks", "query blocks")
    _add_title_and_legend(figure, f"Key blocks that each query block {'selected' if linear else 'kept'}", columns=4)
    return figure


def overlay(
    picture: NDArray[np.uint8],
    weights: NDArray[np.float32],
    top: float,
    mask: NDArray[np.bool_] | None = None,
    place: tuple[int, ...] | None = None,
    grey_picture: bool = True,
) -> NDArray[np.uint8]:
    """Attention weights as a heat map over the picture.

    Args:
        picture: (H, W, 3). weights: (h, w), one per token. top: weight that is shown brightest.
        mask: (h, w), outlined; the rest is darkened. place: row and column of the query token, ringed.
        grey_picture: show the picture in grey.
    """
    times = overlay_scale(picture.shape[1])
    picture = picture.repeat(times, 0).repeat(times, 1)
    height, width = picture.shape[:2]
    rows = np.arange(height) * weights.shape[0] // height
    columns = np.arange(width) * weights.shape[1] // width
    heat = np.sqrt(np.clip(weights / max(top, 1e-12), 0, 1))[rows][:, columns]  # the root makes small weights visible
    grey = np.repeat(picture.mean(-1, keepdims=True), 3, -1) * 0.55 if grey_picture else picture
    if mask is not None:
        grey = np.where(mask[rows][:, columns, None], grey, grey * 0.45)
    alpha = np.clip(0.15 + heat, 0, 0.85)[..., None] * (heat > 0.02)[..., None]
    out = grey * (1 - alpha) + _colour(heat) * alpha
    if mask is not None:
        out[_outline(mask[rows][:, columns])] = (120, 220, 255)
    if place is not None:
        centre = [(p + 0.5) * n / m for p, n, m in zip(place, (height, width), weights.shape, strict=True)]
        _ring(out, centre, radius=max(7.0, width / 64))
    return out.round().astype(np.uint8)


def overlay_scale(width: int) -> int:
    """Scale factor, per side, of the overlay of a picture of this width."""
    return max(1, -(-_MIN_PIXELS // width))


def _colour(heat: NDArray[np.float32]) -> NDArray[np.float32]:
    """Map (H, W) in [0, 1] to (H, W, 3), from dark blue to pale yellow."""
    steps = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(heat, steps, _HEAT[:, channel]) for channel in range(3)], -1)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of the mask with a neighbour outside the mask."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return mask & ~inner


def _ring(out: NDArray[Any], centre: Sequence[float], radius: float) -> None:
    y, x = np.ogrid[: out.shape[0], : out.shape[1]]
    distance = np.hypot(y + 0.5 - centre[0], x + 0.5 - centre[1]) - radius
    out[np.abs(distance) < 3.5] = (20, 20, 20)
    out[np.abs(distance) < 2] = (80, 255, 120)
