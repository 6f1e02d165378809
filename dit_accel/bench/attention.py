"""``dit-accel bench attention``: single attention calls, each in one process and one run with dense attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..backend import check_backend, resolve
from ..errors import BadInput
from .cases import BACKWARD, CASES, Case, select, smoke
from .progress import Progress
from .request import Request
from .results import Row
from .runner import Kind, recording
from .versus import PASSES

__all__ = ["BACKWARD_FIGURES", "measure_cases", "run", "tell", "title"]

_FIGURES = (
    "dense.ms: mean of the medians before and after ours; dense.drift: after over before. times_dense: dense.ms over "
    "ours.ms. fraction: logits in the exact masks over S²; ideal_ms: dense.ms × fraction; efficiency: ideal_ms over "
    "ours.ms. ours: the public function, selection, linear branch and projection included; first_call_s: its first "
    "call, with compilation, tuning and plans. by_kernel: ms a call under the profiler, by kernel. peak_bytes: "
    "beyond the inputs, result included. "
)
_FORWARD_FIGURES = _FIGURES + (
    "graph_ms: the same call in a CUDA graph, which takes the host's part away. checked: largest error of so many "
    "query rows against float32 under the mask."
)
BACKWARD_FIGURES = _FIGURES + (
    "pass backward: ms of torch.autograd.grad of the output alone, what it recomputes included, learned tensors among "
    "the leaves; both_ms: with the forward pass before it; forward_ms: that pass alone, recording; peak_bytes and "
    "first_call_s: of both passes. checked_gradients: on so few tokens, against the torch backend in float32 on the "
    "same numbers, norm of the difference over norm, by tensor; the timed gradients are finite."
)


def run(request: Request) -> int:
    """Measure the cases, one after the other; every finished one is on disk at once.

    Returns: exit status: 0, or 1 if a case failed.
    Raises:
        BadInput: unknown case or backend; nothing was measured.
        KeyboardInterrupt: stopped; what was finished is on disk.
    """
    if request.backward:
        return measure_cases(Kind("backward", BACKWARD_FIGURES, title, tell), BACKWARD, ("backward",), request)
    return measure_cases(Kind("attention", _FORWARD_FIGURES, title, tell), CASES, ("forward",), request)


def measure_cases(
    kind: Kind,
    cases: Mapping[str, Case],
    passes: tuple[str, ...],
    request: Request,
    with_dense: Callable[[list[Row], Row], bool] = lambda rows, row: True,
) -> int:
    """Measure the chosen cases' passes, on each backend.

    Args:
        with_dense: whether dense attention is measured beside a row, after these rows.
    Returns, Raises: as :func:`run`.
    """
    try:
        chosen = [smoke(case) if request.smoke else case for case in select(request.names, cases)]
        for backend in request.backends:
            check_backend(backend, "--backend")
        jobs = [
            (case, _row(case, _name_backend(case, backend, request), which))
            for case in chosen
            for backend in request.backends
            for which in passes
        ]
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from None
    with recording(kind, request, [row for _, row in jobs], order=request.order) as runner:
        for case, row in jobs:
            dense = with_dense(runner.results.rows, row)
            runner.measure(row, partial(_measure, case, row["backend"], request, runner.progress, row["pass"], dense))
    return int(runner.results.failed)


def _name_backend(case: Case, backend: str | None, request: Request) -> str:
    """The backend that the row will be called by; what this machine cannot run is told by the row."""
    try:
        return resolve(backend, request.device, case.mechanism)
    except (ValueError, RuntimeError):
        if backend is None:
            raise
        return backend


def _row(case: Case, backend: str, which: str) -> Row:
    return {
        "case": case.name,
        "backend": backend,
        "pass": which,
        "work": case.work,
        "mechanism": case.mechanism,
        "heads": case.heads,
        "tokens": case.layout.seq_len,
        "head_dim": case.head_dim,
        "grid": list(case.layout.grid),
        "off_grid": case.layout.before + case.layout.after,
        "options": {name: list(x) if isinstance(x, tuple) else x for name, x in case.options.items()},
        "fraction": case.fraction,
        "goal": case.goal,
    }


def _measure(case: Case, backend: str, request: Request, progress: Progress, which: str, dense: bool) -> Row:
    return PASSES[which](case, backend, request, progress, dense)


def title(row: Row) -> str:
    return f"{row['case']} ({row['backend']})" + (", backward" if row["pass"] == "backward" else "")


def tell(row: Row) -> str:
    kernels = ", ".join(f"{name} {ms:.3g}" for name, ms in list(row["ours"]["by_kernel"].items())[:4])
    ours = f"ours {row['ours']['ms']:.4g} ms"
    dense: dict[str, Any] | None = row["dense"]
    if dense is None:
        return f"{ours}; {kernels}"
    goal = "" if row["goal"] is None else f", to reach {row['goal']:g}×"
    return (
        f"dense {dense['ms']:.4g} ms (drift {dense['drift']:.3f}), {ours}, {row['times_dense']:.2f}× dense{goal}, "
        f"efficiency {row['efficiency']:.0%}; {kernels}"
    )
