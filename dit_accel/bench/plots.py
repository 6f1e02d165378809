"""Plots of benchmark results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.errors import BadInput
from ..common.files import replacing
from .results import Row
from .tables import milliseconds, variant

__all__ = ["plot"]

_OURS, _DENSE, _GOAL = "#2a6fbb", "#b8bcc4", "#c0392b"


def plot(content: dict[str, Any], path: Path) -> None:
    """Plot the finished rows of a results file to a PNG.

    Raises: BadInput: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("bench report needs matplotlib: pip install 'dit-accel[bench]'") from None
    rows = [row for row in content["rows"] if row["status"] == "complete"]
    bars = content["kind"] != "scaling"
    figure = Figure(figsize=(8, 1.4 + 0.42 * max(len(rows), 1) if bars else 5), layout="constrained")
    axes = figure.add_subplot()
    _DRAW[content["kind"]](axes, rows)
    if bars:
        axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{content['machine']['device_name']}, {content['machine']['dtype']}", loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Software": None})


def _draw_attention(axes: Any, rows: Sequence[Row]) -> None:
    """Speed-up over dense per case, with a line at the goal and a dot at the ideal: dense's speed per logit."""
    positions = range(len(rows))
    axes.barh(positions, [row["times_dense"] for row in rows], color=_OURS, height=0.6, label="measured")
    axes.set_yticks(list(positions), [row["work"] for row in rows])
    for position, row in zip(positions, rows, strict=True):
        axes.text(row["times_dense"], position, f" {row['times_dense']:.2f}×", va="center", fontsize=8)
    ideal = [1 / row["fraction"] for row in rows]
    axes.plot(ideal, list(positions), "o", color=_DENSE, markersize=5, label="ideal: dense's speed per logit")
    goals = [(position, row["goal"]) for position, row in zip(positions, rows, strict=True) if row["goal"] is not None]
    axes.plot([goal for _, goal in goals], [position for position, _ in goals], "|", color=_GOAL, markersize=16,
              markeredgewidth=2, label="goal")  # fmt: skip
    backward = any(row.get("pass") == "backward" for row in rows)
    axes.set_xlabel(f"speed-up over dense attention{', backward' if backward else ''}", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="lower right")


def _draw_step(axes: Any, rows: Sequence[Row]) -> None:
    """Step times relative to the first dense step of the same model."""
    work = [(row["work"], row.get("checkpointing")) for row in rows]
    pairs = list(zip(work, rows, strict=True))
    baseline = {key: row["ms"] for key, row in reversed(pairs) if row["variant"].startswith("dense")}
    shares = [row["ms"] / baseline.get(key, row["ms"]) for key, row in pairs]
    positions = range(len(rows))
    colours = [_DENSE if row["variant"].startswith("dense") else _OURS for row in rows]
    axes.barh(positions, shares, color=colours, height=0.6)
    axes.set_yticks(list(positions), [f"{row['work']}, {variant(row)}" for row in rows])
    for position, share, row in zip(positions, shares, rows, strict=True):
        axes.text(share, position, f" {milliseconds(row['ms'])}", va="center", fontsize=8)
    training = any("checkpointing" in row for row in rows)
    axes.set_xlabel(f"time per {'training' if training else 'denoiser'} step, dense = 1", fontsize=8)


def _draw_scaling(axes: Any, rows: Sequence[Row]) -> None:
    """Milliseconds over tokens on logarithmic axes: ours and dense, forward and backward."""
    for which, dash, fill in (("forward", "-", None), ("backward", "--", "white")):
        for side, colour in (("dense", _DENSE), ("ours", _OURS)):
            mine = sorted((row["tokens"], row[side]["ms"]) for row in rows if row["pass"] == which and row[side])
            if mine:
                axes.plot(*zip(*mine, strict=True), f"o{dash}", color=colour, markersize=4,
                          markerfacecolor=fill or colour, label=f"{side}, {which}")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(color="#eeeeee")
    axes.set_xlabel("tokens", fontsize=8)
    axes.set_ylabel("ms per pass", fontsize=8)
    if rows:
        axes.legend(fontsize=7, frameon=False, loc="upper left")


def _draw_quality(axes: Any, rows: Sequence[Row]) -> None:
    """Share of captions drawn correctly by the student, untrained and trained, with a line at the teacher's share."""
    positions = range(len(rows))
    for side, colour, height, label in (("after", _OURS, 0.6, "trained"), ("before", _DENSE, 0.3, "not trained")):
        shares = [100 * row[side]["prompt_check"]["student"] for row in rows]
        axes.barh(positions, shares, color=colour, height=height, label=label)
    for position, row in zip(positions, rows, strict=True):
        share = 100 * row["after"]["prompt_check"]["student"]
        axes.text(share, position, f" {share:.1f} %", va="center", fontsize=8)
    teachers = [100 * row["after"]["prompt_check"]["teacher"] for row in rows]
    axes.plot(teachers, list(positions), "|", color=_GOAL, markersize=16, markeredgewidth=2, label="teacher")
    axes.set_yticks(list(positions), [f"{row['teacher']}, {row['mechanism']}: {row['training']}" for row in rows])
    axes.set_xlabel("held-out captions drawn correctly, in per cent", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=3)


_DRAW = {
    "attention": _draw_attention,
    "backward": _draw_attention,
    "quality": _draw_quality,
    "scaling": _draw_scaling,
    "step": _draw_step,
    "train": _draw_step,
}
