"""Measurement of one pass of an attention call, forward or backward: time ours and dense attention, check results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case, small
from .flex import check_rows, reference_mask_mod, time_flex
from .progress import Progress
from .request import Request, dense_attention
from .results import Row
from .timing import Times, graphed, peak_memory, split_by_kernel, time_calls, time_once

__all__ = ["PASSES", "check_gradients"]


class _Calls(NamedTuple):
    """``timed``: the pass alone. ``whole``: the pass with the forward pass it needs, for peak memory."""

    timed: Callable[[], Any]
    whole: Callable[[], Any]


def _measure_forward(case: Case, backend: str, request: Request, progress: Progress, with_dense: bool) -> Row:
    """Figures of the forward pass, in inference mode."""
    with torch.inference_mode():
        query, key, value = tensors = case.inputs(request.device, request.dtype, request.order, request.seed)
        learned = case.parameters(request.device, request.dtype, request.seed)

        def ours() -> Tensor:
            return case.call(tensors, learned, backend)

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(query, key, value)

        progress.doing(f"{case.name} ({backend}): first call")
        out, first = time_once(ours, request.device)
        checked = check_rows(case, tensors, out)
        del out
        calls = (_Calls(ours, ours), (lambda: _Calls(dense, dense)) if with_dense else None)
        figures = _compare(case, backend, *calls, case.dense_flop, request, progress)
        figures["ours"]["first_call_s"] = first
        if request.flex:
            progress.doing(f"{case.name}: FlexAttention")
            figures["flex"] = time_flex(case, tensors, request.repeats)
            if figures["flex"] is not None:
                figures["flex"]["times_dense"] = figures["dense"]["ms"] / figures["flex"]["ms"]
    return {**figures, "checked": checked}


def _measure_backward(case: Case, backend: str, request: Request, progress: Progress, with_dense: bool) -> Row:
    """Figures of the backward pass alone, including recomputation and the gradients of learned tensors."""
    leaves, grad = _leaves(case, request, request.dtype)
    query, key, value = inputs = list(leaves.values())[:3]

    def ours() -> Tensor:
        return _call(case, leaves, backend)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def first_call() -> Sequence[Tensor]:
        return torch.autograd.grad(ours(), list(leaves.values()), grad)

    progress.doing(f"{case.name} ({backend}): first call, forward and backward")
    grads, first = time_once(first_call, request.device)
    for name, found in zip(leaves, grads, strict=True):
        if not bool(torch.isfinite(found).all()):
            raise ArithmeticError(f"{case.name}: the gradient of {name} contains NaN or infinity")
    del grads
    progress.doing(f"{case.name} ({backend}): checking gradients on few tokens")
    checked = check_gradients(case, backend, request)
    calls = (
        _backward_of(ours, list(leaves.values()), grad),
        (lambda: _backward_of(dense, inputs, grad)) if with_dense else None,
    )
    figures = _compare(case, backend, *calls, 2.5 * case.dense_flop, request, progress)
    figures["ours"] |= {"first_call_s": first, "forward_ms": time_calls(ours, request.device, **_timing(request)).ms}
    return {**figures, "checked_gradients": checked}


PASSES = {"forward": _measure_forward, "backward": _measure_backward}


def _leaves(case: Case, request: Request, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Leaf tensors by name, query, key and value first, and the gradient of the output.

    Values are drawn in the request's precision and then converted to ``dtype``, so that they are equal in all dtypes.
    """
    made = case.inputs(request.device, request.dtype, request.order, request.seed)
    tensors = dict(zip(("query", "key", "value"), made, strict=True))
    tensors |= case.parameters(request.device, request.dtype, request.seed)
    grad = case.inputs(request.device, request.dtype, request.order, request.seed + 2)[0]
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}, grad.to(dtype)


def _call(case: Case, leaves: Mapping[str, Tensor], backend: str) -> Tensor:
    inputs = [leaves[name] for name in ("query", "key", "value")]
    return case.call(inputs, {name: leaves[name] for name in case.learned}, backend)


def _backward_of(forward: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> _Calls:
    out = forward()
    return _Calls(
        lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
        lambda: torch.autograd.grad(forward(), leaves, grad),
    )


def check_gradients(case: Case, backend: str, request: Request) -> Row:
    """Compare gradients with the torch backend in float32 on few tokens, so that wrong gradients are not timed.

    Errors are relative: the norm of the difference / the norm of the gradient. The tolerance is larger if blocks are
    selected from the data, because rounding can change the selection at near ties.

    Raises: ArithmeticError: a gradient is wrong or not finite.
    """
    few = small(case)

    def gradients(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        leaves, grad = _leaves(few, request, dtype)
        found = torch.autograd.grad(_call(few, leaves, backend), list(leaves.values()), grad)
        return dict(zip(leaves, found, strict=True))

    actual, expected = gradients(request.dtype, backend), gradients(torch.float32, "torch")
    errors = {name: float((actual[name].float() - grad).norm() / grad.norm()) for name, grad in expected.items()}
    allowed = 0.05 if reference_mask_mod(case) is None else 0.02
    for name, error in errors.items():
        if not error <= allowed:
            raise ArithmeticError(
                f"{case.name}: the gradient of {name} has a relative error of {error:.3g} on {few.layout.seq_len} "
                f"tokens, tolerance {allowed}; not timed"
            )
    return {"tokens": few.layout.seq_len, "heads": few.heads, "errors": errors, "allowed": allowed}


def _timing(request: Request) -> dict[str, Any]:
    return {"samples": request.repeats, "warm_up_ms": 0.0 if request.smoke else 200.0}


def _compare(
    case: Case,
    backend: str,
    ours: _Calls,
    dense: Callable[[], _Calls] | None,
    dense_flop: float,
    request: Request,
    progress: Progress,
) -> Row:
    """Time dense, ours, and dense again. Returns: figures of both and the speed-up."""
    device, timing = request.device, _timing(request)
    name, before = "", None
    if dense is not None:
        with dense_attention(device) as name:
            progress.doing(f"{case.name}: dense, {name}")
            other = dense()
            peak = peak_memory(other.whole, device)
            before = time_calls(other.timed, device, **timing)
    progress.doing(f"{case.name} ({backend}): ours")
    times = time_calls(ours.timed, device, **timing)
    figures: Row = {
        "dense": None,
        "ours": {
            **times.as_row(),
            **_extra_timing(ours, device, timing),
            "peak_bytes": peak_memory(ours.whole, device),
            "by_kernel": split_by_kernel(ours.timed, device),
        },
    }
    if before is None:
        return figures
    with dense_attention(device):
        progress.doing(f"{case.name}: dense again")
        after = time_calls(other.timed, device, **timing)
        more = _extra_timing(other, device, timing)
    figures["dense"] = {**_dense_figures(name, before, after, dense_flop), **more, "peak_bytes": peak}
    return figures | _speedup(figures["dense"]["ms"], times.ms, case)


def _extra_timing(calls: _Calls, device: torch.device, timing: dict[str, Any]) -> Row:
    """Milliseconds of forward plus backward pass, or, for a forward pass on a GPU, of the call in a CUDA graph."""
    if calls.whole is not calls.timed:
        return {"both_ms": time_calls(calls.whole, device, **timing).ms}
    if device.type != "cuda":
        return {}
    return {"graph_ms": time_calls(graphed(calls.timed, device), device, **timing).ms}


def _dense_figures(name: str, before: Times, after: Times, flop: float) -> Row:
    ms = (before.ms + after.ms) / 2
    return {
        "implementation": name,
        "ms": ms,
        "before": before.as_row(),
        "after": after.as_row(),
        "drift": after.ms / before.ms,
        "tflops": flop / ms / 1e9,
    }


def _speedup(dense_ms: float, our_ms: float, case: Case) -> Row:
    """Speed-up over dense, and efficiency against the ideal: dense's speed per logit."""
    ideal = dense_ms * case.fraction
    times = dense_ms / our_ms
    reached = None if case.goal is None else times >= case.goal
    return {"times_dense": times, "ideal_ms": ideal, "efficiency": ideal / our_ms, "reached": reached}
