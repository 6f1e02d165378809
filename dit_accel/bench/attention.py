"""``dit-accel bench attention``: time single attention calls, with dense attention in the same process and run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..common.errors import BadInput
from ..mechanisms.backend import check_backend, resolve
from ..mechanisms.registry import PROCESSORS
from .cases import BACKWARD, CASES, Case, select, smoke
from .progress import Progress
from .request import Request
from .results import Row
from .runner import Kind, open_runner
from .versus import PASSES

__all__ = ["BACKWARD_FIGURES", "measure_cases", "result_line", "run", "title"]

_FIGURES = (
    "dense.ms: mean of the medians measured before and after ours; dense.drift: after / before. times_dense: dense.ms "
    "/ ours.ms. fraction: unmasked logits / S², by the exact mask; ideal_ms: dense.ms × fraction; efficiency: ideal_ms "
    "/ ours.ms. ours: the public function, including selection, linear branch and projection; first_call_s: time of "
    "the first call, including compilation, autotuning and plans. by_kernel: ms per call and kernel under the "
    "profiler. peak_bytes: peak memory minus the inputs, including the result. "
)
_FORWARD_FIGURES = _FIGURES + (
    "graph_ms: the same call as a CUDA graph, without launch overhead. checked: largest absolute error of `rows` query "
    "rows against masked attention in float32."
)
BACKWARD_FIGURES = _FIGURES + (
    "pass backward: ms of torch.autograd.grad alone, including recomputation, with respect to inputs and learned "
    "tensors; both_ms: forward and backward pass; forward_ms: the forward pass alone, with autograd; peak_bytes and "
    "first_call_s: of both passes. checked_gradients: relative error (norm of the difference / norm) per tensor "
    "against the torch backend in float32, on a smaller case with `tokens` tokens; the timed gradients are checked to "
    "be finite."
)


def run(request: Request) -> int:
    """Measure the cases in order; each row is saved as soon as it is finished.

    Returns: exit status: 0, or 1 if a case failed.
    Raises:
        BadInput: unknown case or backend; nothing was measured.
        KeyboardInterrupt: stopped; finished rows are saved.
    """
    if request.backward:
        return measure_cases(Kind("backward", BACKWARD_FIGURES, title, result_line), BACKWARD, ("backward",), request)
    return measure_cases(Kind("attention", _FORWARD_FIGURES, title, result_line), CASES, ("forward",), request)


def measure_cases(
    kind: Kind,
    cases: Mapping[str, Case],
    passes: tuple[str, ...],
    request: Request,
    with_dense: Callable[[list[Row], Row], bool] = lambda rows, row: True,
) -> int:
    """Measure the passes of the selected cases on each backend.

    Args:
        with_dense: called with the finished rows and the next row; True: measure dense attention for that row, too.
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
    with open_runner(kind, request, [row for _, row in jobs], order=request.order) as runner:
        for case, row in jobs:
            dense = with_dense(runner.results.rows, row)
            runner.measure(row, partial(_measure, case, row["backend"], request, runner.progress, row["pass"], dense))
    return int(runner.results.failed)


def _name_backend(case: Case, backend: str | None, request: Request) -> str:
    """Backend name for a row. A requested backend that this machine cannot run is kept; its row then fails."""
    try:
        return resolve(backend, request.device, PROCESSORS[case.mechanism])
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
    """Name of a row for progress messages."""
    return f"{row['case']} ({row['backend']})" + (", backward" if row["pass"] == "backward" else "")


def result_line(row: Row) -> str:
    """Results of a row in one line."""
    kernels = ", ".join(f"{name} {ms:.3g}" for name, ms in list(row["ours"]["by_kernel"].items())[:4])
    ours = f"ours {row['ours']['ms']:.4g} ms"
    dense: dict[str, Any] | None = row["dense"]
    if dense is None:
        return f"{ours}; {kernels}"
    goal = "" if row["goal"] is None else f", goal {row['goal']:g}×"
    return (
        f"dense {dense['ms']:.4g} ms (drift {dense['drift']:.3f}), {ours}, {row['times_dense']:.2f}× dense{goal}, "
        f"efficiency {row['efficiency']:.0%}; {kernels}"
    )
