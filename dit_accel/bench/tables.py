"""Markdown tables of benchmark results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .results import Row

__all__ = ["milliseconds", "table", "variant"]

_Column = tuple[str, Callable[[Row], str]]
_Columns = Sequence[_Column]


def table(content: dict[str, Any]) -> str:
    """Markdown table of a results file, followed by growth exponents, machine and versions."""
    rows = content["rows"]
    lines = _markdown(*_COLUMNS[content["kind"]](rows), rows)
    growth, memory = content.get("growth", ()), content.get("memory", ())
    return "\n\n".join(["\n".join(lines), *map(_growth, growth), *map(_memory, memory), _caption(content)])


def milliseconds(value: float) -> str:
    """Format a duration with three digits, in seconds from one second on."""
    return f"{value / 1e3:.3g} s" if value >= 1e3 else f"{value:.3g} ms"


def variant(row: Row) -> str:
    """Label of a step variant. Dense is labelled compiled or eager; ours is labelled only if it is eager."""
    name = row["variant"].removesuffix("-eager")
    mode = ", eager" if name != row["variant"] else ", compiled" if name == "dense" else ""
    return f"{name}{mode}{', checkpointing' if row.get('checkpointing') else ''}"


def _markdown(names: _Columns, figures: _Columns, rows: Sequence[Row]) -> list[str]:
    """Lines of the table. ``names``: columns that identify a row; a failed row has its error instead of figures."""
    heads = [head for head, _ in (*names, *figures)]
    cells = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in rows:
        first = [cell(row) for _, cell in names]
        if row["status"] == "complete":
            cells.append([*first, *(cell(row) for _, cell in figures)])
        else:
            error = row["error"].splitlines()[0].replace("|", "/")
            cells.append([*first, f"failed: {error}", *[""] * (len(figures) - 1)])
    return [f"| {' | '.join(line)} |" for line in cells]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _goal(row: Row) -> str:
    return "–" if row["goal"] is None else f"≥ {row['goal']:g}×{_mark(row.get('reached'))}"


def _mark(reached: bool | None) -> str:
    return {True: " ✓", False: " ✗", None: ""}[reached]


def _gib(size: float | None) -> str:
    return "–" if size is None else f"{size / 2**30:.2f} GiB"


def _case(rows: Sequence[Row], head: str) -> _Columns:
    several = len({row["backend"] for row in rows}) > 1

    def name(row: Row) -> str:
        backend = f", {row['backend']}" if several else ""
        return f"{row['work']} ({row['heads']}, {row['tokens']:,}, {row['head_dim']}){backend}"

    return [(f"{head} (heads, tokens, head dim)", name)]


_DENSE: _Column = ("dense", lambda row: milliseconds(row["dense"]["ms"]) if row["dense"] else "–")
_OURS: _Column = ("ours", lambda row: milliseconds(row["ours"]["ms"]))
_KERNELS: _Column = ("kernel time", lambda row: _number(_kernels(row), ".3g", " ms"))
_TIMES: _Column = ("× dense", lambda row: _number(row.get("times_dense"), ".2f", "×"))
_GOAL: _Column = ("goal", _goal)


def _attention(rows: Sequence[Row]) -> tuple[_Columns, _Columns]:
    graph = [("× dense, CUDA graphs", _in_graphs)]
    flex = [("FlexAttention", lambda row: milliseconds(row["flex"]["ms"]) if row.get("flex") else "–")]
    return _case(rows, "attention"), [
        _DENSE,
        _OURS,
        *(flex if any(row.get("flex") for row in rows) else []),
        _TIMES,
        *(graph if any("graph_ms" in row.get("ours", {}) for row in rows) else []),
        _KERNELS,
        ("logits", lambda row: f"{row['fraction']:.1%}"),
        ("efficiency", lambda row: f"{row['efficiency']:.0%}"),
        _GOAL,
    ]


def _kernels(row: Row) -> float | None:
    """Sum of the kernel times in a call under the profiler; less than ours.ms if the GPU is idle between kernels."""
    by_kernel = row["ours"].get("by_kernel")
    return sum(by_kernel.values()) if by_kernel else None


def _in_graphs(row: Row) -> str:
    """Speed-up over dense with both in CUDA graphs, without launch overhead."""
    ours, dense = row["ours"].get("graph_ms"), row["dense"].get("graph_ms")
    return "–" if ours is None or dense is None else f"{dense / ours:.2f}×"


def _backward(rows: Sequence[Row]) -> tuple[_Columns, _Columns]:
    return _case(rows, "backward"), [
        _DENSE,
        _OURS,
        _TIMES,
        _KERNELS,
        _GOAL,
        ("with forward: dense", lambda row: milliseconds(row["dense"]["both_ms"])),
        ("ours", lambda row: milliseconds(row["ours"]["both_ms"])),
        ("× dense", lambda row: f"{row['dense']['both_ms'] / row['ours']['both_ms']:.2f}×"),
        ("peak memory: dense", lambda row: _gib(row["dense"]["peak_bytes"])),
        ("ours", lambda row: _gib(row["ours"]["peak_bytes"])),
    ]


def _scaling(rows: Sequence[Row]) -> tuple[_Columns, _Columns]:
    return [*_case(rows, "attention"), ("pass", lambda row: row["pass"])], [
        _DENSE,
        _OURS,
        _TIMES,
        ("logits", lambda row: f"{row['fraction']:.2%}"),
        ("peak memory", lambda row: _gib(row["ours"]["peak_bytes"])),
    ]


def _step(rows: Sequence[Row]) -> tuple[_Columns, _Columns]:
    return [("step", lambda row: row["work"]), ("attention", variant)], [
        ("time", lambda row: milliseconds(row["ms"])),
        _TIMES,
        ("logits", lambda row: _number(row.get("fraction"), ".1%")),
        ("peak memory", lambda row: _gib(row["peak_bytes"])),
        _GOAL,
    ]


def _train(rows: Sequence[Row]) -> tuple[_Columns, _Columns]:
    """Columns of a step, plus the number of tokens and without a goal."""
    names, figures = _step(rows)
    work = ("training step (tokens)", lambda row: f"{row['work']} ({row['tokens']:,})")
    return [work, *names[1:]], figures[:-1]


def _quality(rows: Sequence[Row]) -> tuple[_Columns, _Columns]:
    """Students compared with their teachers, before and after training."""

    def loss(side: str) -> Callable[[Row], str]:
        return lambda row: f"{100 * (row[side]['flow_loss']['student_over_teacher'] - 1):+.1f} %"

    def captions(side: str) -> Callable[[Row], str]:
        return lambda row: (
            f"{100 * row[side]['prompt_check']['student']:.1f} % of {row[side]['prompt_check']['captions']:,}"
        )

    names = [(name, lambda row, name=name: row[name]) for name in ("teacher", "mechanism", "training")]
    return names, [
        ("logits", lambda row: f"{row['after']['logit_fraction']:.1%}"),
        ("steps", lambda row: f"{row['steps']:,}"),
        ("loss, not trained", loss("before")),
        ("trained", loss("after")),
        ("captions correct: teacher", lambda row: f"{100 * row['after']['prompt_check']['teacher']:.1f} %"),
        ("not trained", captions("before")),
        ("trained", captions("after")),
        ("file", lambda row: f"{row['bytes'] / 2**20:.2f} MiB"),
    ]


_COLUMNS = {
    "attention": _attention,
    "backward": _backward,
    "quality": _quality,
    "scaling": _scaling,
    "step": _step,
    "train": _train,
}


def _growth(fit: Row) -> str:
    return (
        f"{fit['pass'].capitalize()} pass, {fit['backend']}, {fit['from']:,} to {fit['to']:,} tokens: time grows "
        f"as tokens^{fit['exponent']:.2f}, goal ≤ {fit['goal']:g}{_mark(fit['reached'])}."
    )


def _memory(fit: Row) -> str:
    return (
        f"{variant(fit)}, {fit['from']:,} to {fit['to']:,} tokens: peak memory grows as tokens^{fit['exponent']:.2f}."
    )


def _caption(content: dict[str, Any]) -> str:
    machine, versions = content["machine"], content["versions"]
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    unfinished = "" if content["status"] == "complete" else f" The run did not finish: {content['status']}."
    smoke = " **Smoke test with tiny sizes: the timings mean nothing.**" if content.get("smoke") else ""
    return (
        f"{machine['device_name']}{driver}, {machine['dtype']}, torch {versions['torch']}, triton "
        f"{versions['triton']}, diffusers {versions['diffusers']}; {content['date'][:10]}; "
        f"`{' '.join(content['command'])}`.{unfinished}{smoke}"
    )
