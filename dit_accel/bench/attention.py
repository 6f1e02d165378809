"""``dit-accel bench attention``: single attention calls, each in one process and one run with dense attention."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import check_backend, resolve
from ..command import BadInput
from .cases import Case, select, smoke
from .flex import check_rows, time_flex
from .progress import Progress
from .request import Request, dense_attention
from .results import Results, about, now
from .timing import TIMING, Times, peak_memory, split_by_kernel, synchronize, time_calls

__all__ = ["run"]

KEY = ("case", "backend")
_FIGURES = (
    "dense.ms: mean of the medians before and after ours; dense.drift: after over before. times_dense: dense.ms over "
    "ours.ms. fraction: logits in the exact masks over S²; ideal_ms: dense.ms × fraction; efficiency: ideal_ms over "
    "ours.ms. ours: the public function, selection, linear branch and projection included; first_call_s: its first "
    "call, with compilation, tuning and plans. by_kernel: ms a call under the profiler, by kernel. peak_bytes: "
    "beyond the inputs, result included. checked: largest error of so many query rows against float32 under the mask."
)


def run(request: Request) -> int:
    """Measure the cases, one after the other; every finished one is on disk at once.

    Returns: exit status: 0, or 1 if a case failed.
    Raises:
        BadInput: unknown case or backend; nothing was measured.
        KeyboardInterrupt: stopped; what was finished is on disk.
    """
    try:
        cases = [smoke(case) if request.smoke else case for case in select(request.names)]
        for backend in request.backends:
            check_backend(backend, "--backend")
        jobs = [(case, _name_backend(case, backend, request)) for case in cases for backend in request.backends]
        facts = about(request.device, request.dtype, list(request.command))
        facts |= {"smoke": request.smoke, "order": request.order, "timing": TIMING, "figures": _FIGURES}
        results = Results("attention", request.out, facts)
        if request.keep is not None:
            results.keep_earlier(request.keep, {(case.name, backend) for case, backend in jobs}, KEY)
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from None
    with results.recording(), Progress(len(jobs)) as progress:
        for case, backend in jobs:
            row = _measure_or_say(case, backend, request, progress)
            results.add(row)
            progress.done(_line(row))
    return int(results.failed)


def _name_backend(case: Case, backend: str | None, request: Request) -> str:
    """The backend that the row will be called by; what this machine cannot run is told by the row."""
    try:
        return resolve(backend, request.device, case.mechanism)
    except (ValueError, RuntimeError):
        if backend is None:
            raise
        return backend


def _measure_or_say(case: Case, backend: str, request: Request, progress: Progress) -> dict[str, Any]:
    """The row of a case: its figures, or why there are none."""
    row: dict[str, Any] = {
        "case": case.name,
        "backend": backend,
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
        "date": now(),
    }
    try:
        with torch.inference_mode():
            figures = _measure(case, backend, request, progress)
    except Exception as error:
        return {**row, "status": "failed", "error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        if request.device.type == "cuda":
            torch.cuda.empty_cache()
    return {**row, **figures, "status": "complete"}


def _measure(case: Case, backend: str, request: Request, progress: Progress) -> dict[str, Any]:
    device = request.device
    query, key, value = tensors = case.inputs(device, request.dtype, request.order, request.seed)
    learned = case.parameters(device, request.dtype, request.seed)

    def ours() -> Tensor:
        return case.call(tensors, learned, backend)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    timing: dict[str, Any] = {"samples": request.repeats, "warm_up_ms": 0.0 if request.smoke else 200.0}
    progress.doing(f"{case.name} ({backend}): first call")
    synchronize(device)
    began = time.perf_counter()
    out = ours()
    synchronize(device)
    first = time.perf_counter() - began
    checked = check_rows(case, tensors, out)
    del out
    with dense_attention(device) as name:
        progress.doing(f"{case.name}: dense, {name}")
        dense_peak = peak_memory(dense, device)
        before = time_calls(dense, device, **timing)
    progress.doing(f"{case.name} ({backend}): ours")
    our_times = time_calls(ours, device, **timing)
    with dense_attention(device):
        progress.doing(f"{case.name}: dense once more")
        after = time_calls(dense, device, **timing)
    figures: dict[str, Any] = {
        "dense": _dense_figures(name, before, after, dense_peak, case),
        "ours": {
            **our_times.as_row(),
            "first_call_s": first,
            "peak_bytes": peak_memory(ours, device),
            "by_kernel": split_by_kernel(ours, device),
        },
        "checked": checked,
    }
    figures |= _compare(figures["dense"]["ms"], our_times.ms, case)
    if request.flex:
        progress.doing(f"{case.name}: FlexAttention")
        figures["flex"] = time_flex(case, tensors, request.repeats)
        if figures["flex"] is not None:
            figures["flex"]["times_dense"] = figures["dense"]["ms"] / figures["flex"]["ms"]
    return figures


def _dense_figures(name: str, before: Times, after: Times, peak: int | None, case: Case) -> dict[str, Any]:
    ms = (before.ms + after.ms) / 2
    return {
        "implementation": name,
        "ms": ms,
        "before": before.as_row(),
        "after": after.as_row(),
        "drift": after.ms / before.ms,
        "tflops": case.dense_flop / ms / 1e9,
        "peak_bytes": peak,
    }


def _compare(dense_ms: float, our_ms: float, case: Case) -> dict[str, Any]:
    """What ours is worth against dense, and against dense's rate on the logits that are needed."""
    ideal = dense_ms * case.fraction
    times = dense_ms / our_ms
    reached = None if case.goal is None else times >= case.goal
    return {"times_dense": times, "ideal_ms": ideal, "efficiency": ideal / our_ms, "reached": reached}


def _line(row: dict[str, Any]) -> str:
    head = f"{row['case']} ({row['backend']})"
    if row["status"] == "failed":
        return f"{head}: failed: {row['error'].splitlines()[0]}"
    goal = "" if row["goal"] is None else f", to reach {row['goal']:g}×"
    kernels = ", ".join(f"{name} {ms:.3g}" for name, ms in list(row["ours"]["by_kernel"].items())[:4])
    return (
        f"{head}: dense {row['dense']['ms']:.4g} ms (drift {row['dense']['drift']:.3f}), ours {row['ours']['ms']:.4g} "
        f"ms, {row['times_dense']:.2f}× dense{goal}, efficiency {row['efficiency']:.0%}; {kernels}"
    )
