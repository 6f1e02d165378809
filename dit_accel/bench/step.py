"""``dit-accel bench step``: whole denoiser steps with random weights, dense compiled against ours compiled."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..command import BadInput
from ..describe import describe, logit_fraction
from ..install import attention, installed_layers
from .models import StepModel, select, smoke
from .progress import Progress
from .request import Request, dense_attention
from .results import Results, about, now
from .timing import TIMING, peak_memory, split_by_kernel, summarise, synchronize, time_calls

__all__ = ["run"]

KEY = ("model", "variant")
_SLOW_MS = 10_000.0  # steps that take longer are timed once, and dense not once more at the end
_FIGURES = (
    "One forward of the denoiser, batch 1, in torch.no_grad. dense: compile_repeated_blocks(fullgraph=True) on the "
    "untouched model; dense-eager: without; ours: the mechanism set, its learned projection random, and compiled the "
    "same way. Softmax attention is cuDNN's on an NVIDIA GPU. first_step_s: the first step, with "
    "compilation, tuning and plans. peak_bytes: beyond weights and inputs. times_dense: the baseline's ms over this "
    "row's; the baseline is dense, or dense-eager where dense was not measured. drift: dense once more after all the "
    "others, over the first time. by_kernel: ms of one more step under the profiler."
)


def run(request: Request) -> int:
    """Measure the models, one after the other; every finished variant is on disk at once.

    Returns: exit status: 0, or 1 if a variant failed.
    Raises:
        BadInput: unknown model or variant; nothing was measured.
        KeyboardInterrupt: stopped; what was finished is on disk.
    """
    try:
        jobs = [(model, _variants(model, request)) for model in select(request.names)]
        facts = about(request.device, request.dtype, list(request.command))
        facts |= {"smoke": request.smoke, "timing": TIMING, "figures": _FIGURES}
        results = Results("step", request.out, facts)
        if request.keep is not None:
            results.keep_earlier(
                request.keep, {(model.name, variant) for model, names in jobs for variant in names}, KEY
            )
    except ValueError as error:
        raise BadInput(str(error)) from None
    with results.recording(), Progress(sum(len(names) for _, names in jobs)) as progress:
        for model, names in jobs:
            _measure_model(smoke(model) if request.smoke else model, names, request, results, progress)
    return int(results.failed)


def _variants(model: StepModel, request: Request) -> tuple[str, ...]:
    """The variants to measure, dense first. Raises: ValueError: the model has no such variant."""
    for name in request.variants:
        if name not in model.variants:
            raise ValueError(f"{model.name} has no variant {name!r}; there are: {', '.join(model.variants)}")
    wanted = request.variants or model.default_variants
    return tuple(name for name in model.variants if name in wanted)


def _measure_model(
    step: StepModel, variants: tuple[str, ...], request: Request, results: Results, progress: Progress
) -> None:
    """Add the rows of one model."""
    model: nn.Module | None = None
    rows: dict[str, dict[str, Any]] = {}
    progress.doing(f"{step.name}: building")
    try:
        for variant in variants:
            row: dict[str, Any] = {
                "model": step.name, "variant": variant, "work": step.work, "grid": list(step.grid), "date": now(),
                "goal": step.ours[variant][1] if variant in step.ours else None,
            }  # fmt: skip
            try:
                if model is None:
                    model = step.build(request.device, request.dtype, request.seed)
                row |= _measure(step, model, variant, request, progress) | {"status": "complete"}
                _compare(row, rows)
            except Exception as error:
                row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
                _forget(request.device)
            rows[variant] = row
            results.add(row)
            progress.done(_line(row))
        if model is not None:
            _measure_drift(step, model, rows, request, results, progress)
    finally:
        del model
        _forget(request.device)


def _measure(step: StepModel, model: nn.Module, variant: str, request: Request, progress: Progress) -> dict[str, Any]:
    """Figures of one variant; the model is as it was afterwards."""
    inputs = step.inputs(request.device, request.dtype, request.seed)
    ours = variant in step.ours
    figures: dict[str, Any] = {"compile": None if variant == "dense-eager" else _compiler(request), "options": None}
    with attention(model, step.ours[variant][0]) if ours else nullcontext(), torch.no_grad():
        if ours:
            figures["options"] = str(step.ours[variant][0])
            _randomise(model, request.seed)
        try:
            if figures["compile"]:
                _compile(model, figures["compile"])
            figures |= _time_steps(step, model, inputs, variant, request, progress)
        finally:
            _uncompile(model)
        if ours:
            figures |= {"fraction": logit_fraction(model), "installed": describe(model)}
    return figures


def _time_steps(
    step: StepModel, model: nn.Module, inputs: dict[str, Any], variant: str, request: Request, progress: Progress
) -> dict[str, Any]:
    device = request.device

    def forward() -> Tensor:
        return model(**inputs, return_dict=False)[0]

    with dense_attention(device, strict=variant not in step.ours) as name:
        progress.doing(f"{step.name}, {variant}: first step")
        synchronize(device)
        began = time.perf_counter()
        out = forward()
        synchronize(device)
        first = time.perf_counter() - began
        if not bool(torch.isfinite(out).all()):
            raise ArithmeticError(f"{step.name}, {variant}: the output holds NaN or infinity")
        del out
        progress.doing(f"{step.name}, {variant}: timing")
        began = time.perf_counter()
        peak = peak_memory(forward, device)  # waits for the device before and after
        once = (time.perf_counter() - began) * 1e3
        if once > _SLOW_MS:
            times = summarise([once])
        else:
            times = time_calls(forward, device, samples=request.repeats, warm_up_ms=0.0, most_calls=1)
        kernels = None if once > _SLOW_MS else split_by_kernel(forward, device, calls=1)
    return {
        **times.as_row(),
        "first_step_s": first,
        "compile_s": first - times.ms / 1e3,
        "peak_bytes": peak,
        "by_kernel": kernels,
        "dense_attention": name,
    }


def _compare(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """× dense, from what was measured before in this run."""
    measured = [name for name in ("dense", "dense-eager") if rows.get(name, {}).get("status") == "complete"]
    if row["variant"].startswith("dense") or not measured:
        return
    row["baseline"] = measured[0]
    row["times_dense"] = rows[measured[0]]["ms"] / row["ms"]
    row["reached"] = None if row["goal"] is None else row["times_dense"] >= row["goal"]


def _measure_drift(
    step: StepModel,
    model: nn.Module,
    rows: dict[str, dict[str, Any]],
    request: Request,
    results: Results,
    progress: Progress,
) -> None:
    """Dense once more, where others came after it and it is quick enough."""
    dense = rows.get("dense", {})
    if dense.get("status") != "complete" or len(rows) < 2 or dense["ms"] > _SLOW_MS:
        return
    again = _measure(step, model, "dense", request, progress)
    dense["again_ms"], dense["drift"] = again["ms"], again["ms"] / dense["ms"]
    results.save()
    progress.say(f"{step.name}, dense once more: {again['ms']:.4g} ms, drift {dense['drift']:.3f}")


def _compiler(request: Request) -> str:
    return "inductor" if request.device.type == "cuda" else "aot_eager"  # off the GPU it is a trial only


def _compile(model: nn.Module, backend: str) -> None:
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)  # type: ignore[operator]


def _uncompile(model: nn.Module) -> None:
    """As it was before it was compiled."""
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()


def _randomise(model: nn.Module, seed: int) -> None:
    """Learned parameters as after training: as they begin, at zero, they might be skipped."""
    for i, layer in enumerate(installed_layers(model).values()):
        for parameter in layer.parameters():
            generator = torch.Generator(parameter.device).manual_seed(seed + i)
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _line(row: dict[str, Any]) -> str:
    head = f"{row['model']}, {row['variant']}"
    if row["status"] == "failed":
        return f"{head}: failed: {row['error'].splitlines()[0]}"
    times = f", {row['times_dense']:.2f}× {row['baseline']}" if "times_dense" in row else ""
    goal = "" if row["goal"] is None else f", to reach {row['goal']:g}×"
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.2f} GiB"
    return f"{head}: {row['ms']:.4g} ms{times}{goal}{peak}, compilation {row['compile_s']:.3g} s"
