"""Results as plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..files import replacing
from .results import Row
from .tables import milliseconds, variant

__all__ = ["plot"]

_OURS, _DENSE, _GOAL = "#2a6fbb", "#b8bcc4", "#c0392b"


def plot(content: dict[str, Any], path: Path) -> None:
    """Raises: BadInput: matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("bench report draws with matplotlib: pip install 'dit-accel[bench]'") from None
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
    """× dense a case; a line where it is to be, a dot where dense's rate on the needed logits alone would be."""
    places = range(len(rows))
    axes.barh(places, [row["times_dense"] for row in rows], color=_OURS, height=0.6, label="measured")
    axes.set_yticks(list(places), [row["work"] for row in rows])
    for place, row in zip(places, rows, strict=True):
        axes.text(row["times_dense"], place, f" {row['times_dense']:.2f}×", va="center", fontsize=8)
    ideal = [1 / row["fraction"] for row in rows]
    axes.plot(ideal, list(places), "o", color=_DENSE, markersize=5, label="dense's rate on the needed logits")
    goals = [(place, row["goal"]) for place, row in zip(places, rows, strict=True) if row["goal"] is not None]
    axes.plot([goal for _, goal in goals], [place for place, _ in goals], "|", color=_GOAL, markersize=16,
              markeredgewidth=2, label="to reach")  # fmt: skip
    backward = any(row.get("pass") == "backward" for row in rows)
    axes.set_xlabel(f"times as fast as dense attention{', backward' if backward else ''}", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="lower right")


def _draw_step(axes: Any, rows: Sequence[Row]) -> None:
    """A step's time, dense and ours, as a share of the first dense one's of the same work."""
    work = [(row["work"], row.get("checkpointing")) for row in rows]
    pairs = list(zip(work, rows, strict=True))
    slowest = {key: row["ms"] for key, row in reversed(pairs) if row["variant"].startswith("dense")}
    shares = [row["ms"] / slowest.get(key, row["ms"]) for key, row in pairs]
    places = range(len(rows))
    colours = [_DENSE if row["variant"].startswith("dense") else _OURS for row in rows]
    axes.barh(places, shares, color=colours, height=0.6)
    axes.set_yticks(list(places), [f"{row['work']}, {variant(row)}" for row in rows])
    for place, share, row in zip(places, shares, rows, strict=True):
        axes.text(share, place, f" {milliseconds(row['ms'])}", va="center", fontsize=8)
    training = any("checkpointing" in row for row in rows)
    axes.set_xlabel(f"time of a {'training' if training else 'denoiser'} step, dense = 1", fontsize=8)


def _draw_scaling(axes: Any, rows: Sequence[Row]) -> None:
    """Milliseconds by tokens, both on logarithmic axes: ours and dense, forward and backward."""
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
    axes.set_ylabel("ms a pass", fontsize=8)
    if rows:
        axes.legend(fontsize=7, frameon=False, loc="upper left")


def _draw_quality(axes: Any, rows: Sequence[Row]) -> None:
    """Captions drawn right, by the student before and after its training; a line where the teacher is."""
    places = range(len(rows))
    for side, colour, height, label in (("after", _OURS, 0.6, "trained"), ("before", _DENSE, 0.3, "not trained")):
        shares = [100 * row[side]["prompt_check"]["student"] for row in rows]
        axes.barh(places, shares, color=colour, height=height, label=label)
    for place, row in zip(places, rows, strict=True):
        share = 100 * row["after"]["prompt_check"]["student"]
        axes.text(share, place, f" {share:.1f} %", va="center", fontsize=8)
    teachers = [100 * row["after"]["prompt_check"]["teacher"] for row in rows]
    axes.plot(teachers, list(places), "|", color=_GOAL, markersize=16, markeredgewidth=2, label="teacher")
    axes.set_yticks(list(places), [f"{row['teacher']}, {row['mechanism']}: {row['training']}" for row in rows])
    axes.set_xlabel("held-out captions drawn right, in per cent", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=3)


_DRAW = {
    "attention": _draw_attention,
    "backward": _draw_attention,
    "quality": _draw_quality,
    "scaling": _draw_scaling,
    "step": _draw_step,
    "train": _draw_step,
}
