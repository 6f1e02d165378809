"""``dit-accel bench step``: time whole denoiser steps with random weights, compiled dense against compiled ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import BadInput
from ..install.describe import describe, logit_fraction
from ..install.installation import attention, installed_layers
from .models import MODELS, StepModel, select, smoke
from .progress import Progress
from .request import Request, dense_attention
from .results import Row
from .runner import Kind, Runner, free_memory, open_runner
from .timing import peak_memory, split_by_kernel, summarise, time_calls, time_once

__all__ = ["KIND", "StepKind", "measure_steps", "result_line", "run", "title"]

_SLOW_MS = 10_000.0  # steps that take longer are timed once, and dense is not repeated at the end
_FIGURES = (
    "One forward pass of the denoiser, batch 1, in torch.no_grad. dense: the original model with "
    "compile_repeated_blocks(fullgraph=True); dense-eager: not compiled; ours: with the mechanism, a random learned "
    "projection, and compiled the same way. Softmax attention is cuDNN's on an NVIDIA GPU. first_step_s: the first "
    "step, including compilation, autotuning and plans. peak_bytes: peak memory minus weights and inputs. times_dense: "
    "the baseline's ms / this row's ms; the baseline is dense, or dense-eager if dense was not measured. drift: time "
    "of dense repeated at the end / its first time. by_kernel: ms per kernel of one step under the profiler."
)


@dataclass(frozen=True, kw_only=True)
class StepKind(Kind):
    """A benchmark of whole steps.

    Args:
        prepare: context that yields the step to time: ``with prepare(model, inputs, request) as step: step()``.
        facts: entries of a row that come from the request and are part of its key.
    """

    prepare: Callable[[nn.Module, dict[str, Any], Request], AbstractContextManager[Callable[[], Tensor]]]
    facts: Callable[[Request], Row] = lambda request: {}


@contextmanager
def _denoising(model: nn.Module, inputs: dict[str, Any], request: Request) -> Iterator[Callable[[], Tensor]]:
    with torch.no_grad():
        yield lambda: model(**inputs, return_dict=False)[0]


def title(row: Row) -> str:
    """Name of a row for progress messages."""
    return f"{row['model']}, {row['variant']}"


def result_line(row: Row) -> str:
    """Results of a row in one line."""
    times = f", {row['times_dense']:.2f}× {row['baseline']}" if "times_dense" in row else ""
    goal = "" if row["goal"] is None else f", goal {row['goal']:g}×"
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.2f} GiB"
    compiled = f", compilation {row['compile_s']:.3g} s" if row["compile"] else ""
    return f"{row['ms']:.4g} ms{times}{goal}{peak}{compiled}"


KIND = StepKind("step", _FIGURES, title, result_line, prepare=_denoising)


def run(request: Request) -> int:
    """Measure the models in order; each variant is saved as soon as it is finished.

    Returns: exit status: 0, or 1 if a variant failed.
    Raises:
        BadInput: unknown model or variant; nothing was measured.
        KeyboardInterrupt: stopped; finished variants are saved.
    """
    return measure_steps(KIND, MODELS, request)


def measure_steps(kind: StepKind, models: Mapping[str, StepModel], request: Request) -> int:
    """Measure the variants of the selected models. Returns, Raises: as :func:`run`."""
    try:
        jobs = [(model, _variants(model, request)) for model in select(request.names, models)]
    except ValueError as error:
        raise BadInput(str(error)) from None
    rows = [
        {"model": model.name, "variant": variant, **kind.facts(request)}
        for model, variants in jobs
        for variant in variants
    ]
    with open_runner(kind, request, rows) as runner:
        for model, variants in jobs:
            _measure_model(smoke(model) if request.smoke else model, variants, kind, runner)
    return int(runner.results.failed)


def _variants(model: StepModel, request: Request) -> tuple[str, ...]:
    """Variants to measure, dense first. Raises: ValueError: the model has no such variant."""
    for name in request.variants:
        if name not in model.variants:
            raise ValueError(f"{model.name} has no variant {name!r}; available: {', '.join(model.variants)}")
    selected = request.variants or model.default_variants
    return tuple(name for name in model.variants if name in selected)


def _measure_model(step: StepModel, variants: tuple[str, ...], kind: StepKind, runner: Runner) -> None:
    """Measure the variants of one model and add their rows."""
    request, progress = runner.request, runner.progress
    progress.doing(f"{step.name}: building")
    build = cache(partial(step.build, request.device, request.dtype, request.seed))
    rows: dict[str, Row] = {}

    def figures(variant: str) -> Row:
        found = _measure(step, build(), variant, kind, request, progress)
        return {**found, **_speedup(variant, found["ms"], step.goal(variant), rows)}

    for variant in variants:
        row = {
            "model": step.name, "variant": variant, **kind.facts(request), "work": step.work, "grid": list(step.grid),
            "tokens": math.prod(step.grid), "goal": step.goal(variant),
        }  # fmt: skip
        rows[variant] = runner.measure(row, partial(figures, variant))
    _measure_drift(step, build, rows, kind, runner)
    build.cache_clear()
    free_memory(request.device)


def _measure(
    step: StepModel, model: nn.Module, variant: str, kind: StepKind, request: Request, progress: Progress
) -> Row:
    """Figures of one variant; the model is restored afterwards."""
    inputs = step.inputs(request.device, request.dtype, request.seed)
    processor = step.processor(variant)
    figures: Row = {
        "compile": None if variant.endswith("-eager") else _compiler(request),
        "options": None if processor is None else str(processor),
    }
    with nullcontext() if processor is None else attention(model, processor):
        if processor is not None:
            _randomise(model, request.seed)
        try:
            if figures["compile"]:
                _compile(model, figures["compile"])
            strict = processor is None
            with kind.prepare(model, inputs, request) as call, dense_attention(request.device, strict) as name:
                figures |= _time_steps(f"{step.name}, {variant}", call, request, progress)
        finally:
            _uncompile(model)
        figures["dense_attention"] = name
        if processor is not None:
            figures |= {"fraction": logit_fraction(model), "installed": describe(model)}
    return figures


def _time_steps(title: str, call: Callable[[], Tensor], request: Request, progress: Progress) -> Row:
    device = request.device
    progress.doing(f"{title}: first step")
    out, first = time_once(call, device)
    if not bool(torch.isfinite(out).all()):
        raise ArithmeticError(f"{title}: the output contains NaN or infinity")
    del out
    progress.doing(f"{title}: timing")
    peak, once_s = time_once(lambda: peak_memory(call, device), device)
    once = once_s * 1e3
    if once > _SLOW_MS:
        times = summarise([once])
    else:
        times = time_calls(call, device, samples=request.repeats, warm_up_ms=0.0, max_calls=1)
    return {
        **times.as_row(),
        "first_step_s": first,
        "compile_s": first - times.ms / 1e3,
        "peak_bytes": peak,
        "by_kernel": None if once > _SLOW_MS else split_by_kernel(call, device, calls=1),
    }


def _speedup(variant: str, ms: float, goal: float | None, rows: Mapping[str, Row]) -> Row:
    """Speed-up over a dense variant of this run; eager variants are compared with dense-eager if it was measured."""
    baselines = ["dense", "dense-eager"]
    if variant in baselines:
        return {}
    if variant.endswith("-eager"):
        baselines.reverse()
    measured = [name for name in baselines if rows.get(name, {}).get("status") == "complete"]
    if not measured:
        return {}
    times = rows[measured[0]]["ms"] / ms
    return {"baseline": measured[0], "times_dense": times, "reached": None if goal is None else times >= goal}


def _measure_drift(
    step: StepModel, build: Callable[[], nn.Module], rows: Mapping[str, Row], kind: StepKind, runner: Runner
) -> None:
    """Measure dense again at the end, if there are other variants and a step is at most ``_SLOW_MS``."""
    dense = rows.get("dense", {})
    if dense.get("status") != "complete" or len(rows) < 2 or dense["ms"] > _SLOW_MS:
        return
    again = _measure(step, build(), "dense", kind, runner.request, runner.progress)
    dense["again_ms"], dense["drift"] = again["ms"], again["ms"] / dense["ms"]
    runner.results.save()
    runner.progress.say(f"{step.name}, dense repeated: {again['ms']:.4g} ms, drift {dense['drift']:.3f}")


def _compiler(request: Request) -> str:
    return "inductor" if request.device.type == "cuda" else "aot_eager"  # CPU runs only test the code path


def _compile(model: nn.Module, backend: str) -> None:
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)  # type: ignore[operator]


def _uncompile(model: nn.Module) -> None:
    """Undo :func:`_compile`."""
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()


def _randomise(model: nn.Module, seed: int) -> None:
    """Set learned parameters to random values; an implementation could skip the initial zeros."""
    for i, layer in enumerate(installed_layers(model).values()):
        for parameter in layer.parameters():
            generator = torch.Generator(parameter.device).manual_seed(seed + i)
            with torch.no_grad():
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
