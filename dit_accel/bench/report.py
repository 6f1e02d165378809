"""Results as tables for README.md, and as plots beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..command import BadInput
from ..files import replacing
from .results import KINDS, read_results

__all__ = ["fill", "report", "table"]

_OURS, _DENSE, _GOAL = "#2a6fbb", "#b8bcc4", "#c0392b"


def report(folder: Path, readme: Path) -> int:
    """Plots beside the results, and README.md's tables from them; a table that README.md has no place for is printed.

    Returns: 0.
    Raises: BadInput: no results, files that are not results, no matplotlib, a README.md that is not there.
    """
    found = [kind for kind in KINDS if (folder / f"{kind}.json").is_file()]
    if not found:
        raise BadInput(f"no results in {folder}: run dit-accel bench attention or dit-accel bench step first")
    try:
        results = {kind: read_results(folder / f"{kind}.json") for kind in found}
        text = readme.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(str(error)) from None
    for kind, content in results.items():
        if (filled := fill(text, kind, table(content))) is None:
            print(f"{readme} has no <!-- bench:{kind} --> … <!-- /bench:{kind} -->; its table would be:")
            print(table(content))
        else:
            text = filled
    for kind, content in results.items():
        _plot(content, folder / f"{kind}.png")
        print(folder / f"{kind}.png")
    if text != readme.read_text(encoding="utf-8"):
        with replacing(readme) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(readme)
    return 0


def fill(text: str, kind: str, content: str) -> str | None:
    """The text with this between the two comments of ``kind``; None where it has none.

    Raises: BadInput: the comments stand there more than once.
    """
    begin, end = f"<!-- bench:{kind} -->", f"<!-- /bench:{kind} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not (found := pattern.findall(text)):
        return None
    if len(found) > 1:
        raise BadInput(f"{begin} stands there {len(found)} times: one of each")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def table(content: dict[str, Any]) -> str:
    """The rows of a results file in Markdown, and under them on what they were measured."""
    rows = content["rows"]
    lines = _attention_lines(rows) if content["kind"] == "attention" else _step_lines(rows)
    return "\n".join([*lines, "", _caption(content)])


def _caption(content: dict[str, Any]) -> str:
    machine, versions = content["machine"], content["versions"]
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    unfinished = "" if content["status"] == "complete" else f" The run was not finished: {content['status']}."
    smoke = " **A trial with tiny sizes: the figures mean nothing.**" if content.get("smoke") else ""
    return (
        f"{machine['device_name']}{driver}, {machine['dtype']}, torch {versions['torch']}, triton "
        f"{versions['triton']}, diffusers {versions['diffusers']}; {content['date'][:10]}; "
        f"`{' '.join(content['command'])}`.{unfinished}{smoke}"
    )


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    under = ["---" if i == 0 else "---:" for i in range(len(heads))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, under, *rows)]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _ms(value: float) -> str:
    return f"{value / 1e3:.3g} s" if value >= 1e3 else f"{value:.3g} ms"


def _goal(row: dict[str, Any]) -> str:
    if row["goal"] is None:
        return "–"
    mark = {True: " ✓", False: " ✗", None: ""}[row.get("reached")]
    return f"≥ {row['goal']:g}×{mark}"


def _failed(row: dict[str, Any], columns: int) -> list[str]:
    return [f"failed: {row['error'].splitlines()[0].replace('|', '/')}", *[""] * (columns - 1)]


def _attention_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    heads = ["attention (heads, tokens, head dim)", "dense", "ours", "× dense", "logits", "efficiency", "to reach"]
    flex = any(row.get("flex") for row in rows)
    heads[3:3] = ["FlexAttention"] if flex else []
    several = len({row["backend"] for row in rows}) > 1
    cells = []
    for row in rows:
        backend = f", {row['backend']}" if several else ""
        work = f"{row['work']} ({row['heads']}, {row['tokens']:,}, {row['head_dim']}){backend}"
        if row["status"] != "complete":
            cells.append([work, *_failed(row, len(heads) - 1)])
            continue
        peer = row.get("flex")
        cells.append([
            work, _ms(row["dense"]["ms"]), _ms(row["ours"]["ms"]),
            *([_ms(peer["ms"]) if peer else "–"] if flex else []), f"{row['times_dense']:.2f}×",
            f"{row['fraction']:.1%}", f"{row['efficiency']:.0%}", _goal(row),
        ])  # fmt: skip
    return _markdown(heads, cells)


_VARIANTS = {"dense": "dense, compiled", "dense-eager": "dense, eager"}


def _step_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    heads = ["step", "attention", "time", "× dense", "logits", "peak memory", "to reach"]
    cells = []
    for row in rows:
        what = [row["work"], _VARIANTS.get(row["variant"], row["variant"])]
        if row["status"] != "complete":
            cells.append([*what, *_failed(row, len(heads) - 2)])
            continue
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30
        cells.append([
            *what, _ms(row["ms"]), _number(row.get("times_dense"), ".2f", "×"), _number(row.get("fraction"), ".1%"),
            _number(peak, ".2f", " GiB"), _goal(row),
        ])  # fmt: skip
    return _markdown(heads, cells)


def _plot(content: dict[str, Any], path: Path) -> None:
    """Raises: BadInput: matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("bench report draws with matplotlib: pip install 'dit-accel[bench]'") from None
    rows = [row for row in content["rows"] if row["status"] == "complete"]
    draw: Callable[[Any, list[dict[str, Any]]], None] = {"attention": _draw_attention, "step": _draw_step}[
        content["kind"]
    ]
    figure = Figure(figsize=(8, 1.4 + 0.42 * max(len(rows), 1)), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, rows)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{content['machine']['device_name']}, {content['machine']['dtype']}", loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Software": None})


def _draw_attention(axes: Any, rows: list[dict[str, Any]]) -> None:
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
    axes.set_xlabel("times as fast as dense attention", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="lower right")


def _draw_step(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A step's time, dense and ours, as a share of its dense baseline's."""
    slowest = {row["work"]: row["ms"] for row in reversed(rows) if row["variant"].startswith("dense")}
    shares = [row["ms"] / slowest.get(row["work"], row["ms"]) for row in rows]
    places = range(len(rows))
    colours = [_DENSE if row["variant"].startswith("dense") else _OURS for row in rows]
    axes.barh(places, shares, color=colours, height=0.6)
    axes.set_yticks(list(places), [f"{row['work']}, {_VARIANTS.get(row['variant'], row['variant'])}" for row in rows])
    for place, share, row in zip(places, shares, rows, strict=True):
        axes.text(share, place, f" {_ms(row['ms'])}", va="center", fontsize=8)
    axes.set_xlabel("time of a denoiser step, dense = 1", fontsize=8)
