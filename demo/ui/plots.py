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

__all__ = [
    "NAMES", "caught_figure", "enlarged", "label_axes", "map_figure", "new_figure", "overlay", "speed_figure",
    "two_digits",
]  # fmt: skip

NAMES = {"dense": "Dense", "sla": "SLA", "clear": "CLEAR", "llsa": "LLSA", "gna": "GNA"}
_COLOURS = {"dense": "#7d838c", "sla": "#2f7ed8", "clear": "#e08214", "llsa": "#2a9d5c", "gna": "#9b5fc0"}
_MARKS = {"dense": "s", "sla": "o", "clear": "^", "llsa": "D", "gna": "v"}  # told apart without colours, too
_INK, _GRID = "#7b8290", "#7b829040"  # grey: on white and on black
_STATES = ("#7b829022", "#9ec5f0", "#1f5fae")  # left out, linear, critical
_PLACE = "#e4572e"
_LEAST_PIXELS = 512
_HEAT = np.array([[13, 8, 60], [126, 3, 168], [204, 71, 120], [248, 149, 64], [252, 253, 150]], np.float32)


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


def _head(figure: Figure, title: str, columns: int) -> None:
    """A title above the axes, and the legend under them."""
    figure.suptitle(title, color=_INK, fontsize=10, fontweight="bold", x=0.02, ha="left")
    figure.legend(fontsize=8.5, frameon=False, labelcolor=_INK, ncols=columns, loc="outside lower left")


def speed_figure(rows: Sequence[Mapping[str, Any]], points: Mapping[str, Any], subtitle: str) -> Figure:
    """Milliseconds a call by tokens, both on logarithmic axes; a star where a mechanism breaks even with dense."""
    figure, axes = new_figure(9, 5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for name, colour in _COLOURS.items():
        mine = sorted(
            (row["tokens"], row["ms"], row["q1"], row["q3"])
            for row in rows
            if row["attention"] == name and row["status"] == "complete"
        )
        if mine:
            tokens, ms, q1, q3 = zip(*mine, strict=True)
            axes.fill_between(tokens, q1, q3, color=colour, alpha=0.2, linewidth=0)
            width = 3 if name == "dense" else 1.8
            axes.plot(tokens, ms, color=colour, marker=_MARKS[name], markersize=5, lw=width, label=NAMES[name])
    for name, point in points.items():
        _mark_break_even(axes, name, point)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(color=_GRID, linewidth=0.6)
    label_axes(axes, "tokens", "milliseconds a call", subtitle)
    if rows:
        axes.legend(fontsize=9, frameon=False, labelcolor=_INK, loc="upper left")
    return figure


def two_digits(number: float) -> int:
    """What was interpolated is not known better."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return round(number / unit) * unit


def _mark_break_even(axes: Any, name: str, point: Any) -> None:
    """A star on the curve and a line down to the tokens; nothing where there is none between two measured sizes."""
    if point.tokens is None or point.slower is None:
        return
    colour = _COLOURS[name]
    axes.plot([point.tokens], [point.ms], "*", color=colour, markersize=17, markeredgecolor="white", zorder=5)
    axes.axvline(point.tokens, color=colour, linestyle=":", linewidth=1.2)
    axes.annotate(
        f" {NAMES[name]}: {two_digits(point.tokens):,}", (point.tokens, 0), xycoords=("data", "axes fraction"),
        rotation=90, ha="right", va="bottom", color=colour, fontsize=8,
    )  # fmt: skip


def caught_figure(
    name: str, title: str, layers: Sequence[str], found: Sequence[Any], chosen: str, wide: bool
) -> Figure:
    """For each layer the share of dense attention's mass on what the mechanism sees; the layer that is looked at is
    filled, and a line stands where it would be if attention were even."""
    figure, axes = new_figure(*((9.5, 3.8) if wide else (8, 4.4)))
    places = range(len(layers))
    colour = _COLOURS[name]
    alphas = [1.0 if layer == chosen else 0.45 for layer in layers]
    for place, one, alpha in zip(places, found, alphas, strict=True):
        axes.bar(place, 100 * one.mass, color=colour, alpha=alpha, width=0.7)
        axes.bar(place, 100 * one.text, color="none", edgecolor=_INK, hatch="////", width=0.7, linewidth=0)
        axes.text(place, 100 * one.mass + 1, f"{100 * one.mass:.0f}", ha="center", color=_INK, fontsize=8)
    if found:
        axes.axhline(100 * found[0].logits, color=_PLACE, linestyle="--", linewidth=1.2, label="if attention were even")
    axes.bar(0, 0, color=colour, label=f"on what {NAMES[name]} sees")
    if any(one.text > 0.005 for one in found):
        axes.bar(0, 0, color="none", edgecolor=_INK, hatch="////", label="of it on text", linewidth=0)
    axes.set_xticks(list(places), [str(place + 1) for place in places])
    axes.set_ylim(0, 108)
    axes.xaxis.set_major_locator(MaxNLocator(30, integer=True)) if len(layers) > 30 else None
    label_axes(axes, "layer", "% of dense attention")
    _head(figure, title, columns=3)
    return figure


def map_figure(name: str, states: NDArray[np.int32], row: int) -> Figure:
    """Query blocks by key blocks; the row of the place that is looked at is marked."""
    figure, axes = new_figure(5.3, 4.4)
    axes.imshow(states, cmap=ListedColormap(_STATES), vmin=0, vmax=2, interpolation="nearest", aspect="auto")
    axes.axhline(row - 0.5, color=_PLACE, linewidth=0.8)
    axes.axhline(row + 0.5, color=_PLACE, linewidth=0.8)
    words = ["left out", "linear", "critical"] if name == "sla" else ["not kept", "", "kept"]
    for colour, word in zip(reversed(_STATES), reversed(words), strict=True):
        if word:
            axes.plot([], [], "s", color=colour, markeredgecolor=_INK, markeredgewidth=0.5, label=word)
    axes.plot([], [], color=_PLACE, label="this place")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    label_axes(axes, "blocks that are looked at", "blocks that look")
    _head(figure, f"Blocks that each block of places {'chose' if name == 'sla' else 'kept'}", columns=4)
    return figure


def overlay(
    picture: NDArray[np.uint8],
    weights: NDArray[np.float32],
    top: float,
    seen: NDArray[np.bool_] | None = None,
    place: tuple[int, ...] | None = None,
    faint: bool = True,
) -> NDArray[np.uint8]:
    """Weights as heat over a grey picture (with ``faint=False`` over the picture as it is).

    Args:
        picture: (H, W, 3). weights: (h, w) of its tokens. top: the weight that is shown brightest.
        seen: (h, w), outlined; the rest is dark. place: row and column of the token that looks, ringed.
    """
    times = enlarged(picture.shape[1])
    picture = picture.repeat(times, 0).repeat(times, 1)
    height, width = picture.shape[:2]
    rows = np.arange(height) * weights.shape[0] // height
    columns = np.arange(width) * weights.shape[1] // width
    heat = np.sqrt(np.clip(weights / max(top, 1e-12), 0, 1))[rows][:, columns]  # the root: faint ones are seen, too
    grey = np.repeat(picture.mean(-1, keepdims=True), 3, -1) * 0.55 if faint else picture
    if seen is not None:
        grey = np.where(seen[rows][:, columns, None], grey, grey * 0.45)
    alpha = np.clip(0.15 + heat, 0, 0.85)[..., None] * (heat > 0.02)[..., None]
    out = grey * (1 - alpha) + _colour(heat) * alpha
    if seen is not None:
        out[_outline(seen[rows][:, columns])] = (120, 220, 255)
    if place is not None:
        centre = [(p + 0.5) * n / m for p, n, m in zip(place, (height, width), weights.shape, strict=True)]
        _ring(out, centre, radius=max(7.0, width / 64))
    return out.round().astype(np.uint8)


def enlarged(width: int) -> int:
    """How many pixels an overlay has for one of a picture of this width, along each side."""
    return max(1, -(-_LEAST_PIXELS // width))


def _colour(heat: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W) in [0, 1] to (H, W, 3), from dark blue to pale yellow."""
    steps = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(heat, steps, _HEAT[:, channel]) for channel in range(3)], -1)


def _outline(seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of what is seen whose neighbour is not."""
    inner = seen.copy()
    inner[1:] &= seen[:-1]
    inner[:-1] &= seen[1:]
    inner[:, 1:] &= seen[:, :-1]
    inner[:, :-1] &= seen[:, 1:]
    return seen & ~inner


def _ring(out: NDArray[Any], centre: Sequence[float], radius: float) -> None:
    y, x = np.ogrid[: out.shape[0], : out.shape[1]]
    away = np.hypot(y + 0.5 - centre[0], x + 0.5 - centre[1]) - radius
    out[np.abs(away) < 3.5] = (20, 20, 20)
    out[np.abs(away) < 2] = (80, 255, 120)
