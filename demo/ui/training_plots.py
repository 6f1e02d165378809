"""Plots of a running conversion, legible on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from .plots import label_axes, new_figure

__all__ = ["distance_figure", "loss_figure"]

_LINE, _FAINT, _INK = "#2f7ed8", "#2f7ed866", "#8a8f98"
_SIZE = (4.2, 2.7)
_MEAN_WINDOW = 8


def distance_figure(distances: Mapping[int, float], steps: int) -> Figure:
    """Plot the distance to dense attention in percent against steps; the first and last points are labelled."""
    figure, axes = new_figure(*_SIZE)
    at = sorted(distances)
    values = [100 * distances[step] for step in at]
    axes.plot(at, values, "o-", color=_LINE, linewidth=2, markersize=5)
    for i in {0, len(at) - 1} if at else ():
        axes.annotate(
            f"{values[i]:.2g} %", (at[i], values[i]), (0, 7), textcoords="offset points", color=_INK, fontsize=10,
            ha="center" if i else "left",
        )  # fmt: skip
    axes.set_xlim(-0.02 * steps, 1.04 * steps)
    axes.set_ylim(0, 1.25 * max(values, default=1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    label_axes(axes, "step", "%", "Distance to dense attention")
    return figure


def loss_figure(history: Sequence[Mapping[str, float]], steps: int) -> Figure:
    """Plot the loss of each step and a running mean, on a logarithmic axis."""
    figure, axes = new_figure(*_SIZE)
    losses = np.array([row["loss"] for row in history])
    at = np.arange(1, len(losses) + 1)
    if len(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        sums = np.cumsum(losses) - np.concatenate([np.zeros(_MEAN_WINDOW), np.cumsum(losses)])[: len(losses)]
        axes.plot(at, losses, "o", color=_FAINT, markersize=4, label="each step")
        axes.plot(at, sums / np.minimum(at, _MEAN_WINDOW), color=_LINE, linewidth=2, label=f"mean of {_MEAN_WINDOW}")
        axes.legend(fontsize=9, frameon=False, labelcolor=_INK, loc="upper right", ncols=2, borderaxespad=0)
        axes.set_ylim(losses.min() / 1.3, losses.max() * 2.2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    axes.set_xlim(-0.02 * steps, 1.04 * steps)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    label_axes(axes, "step", "loss", "Training loss")
    return figure
