"""Timing of GPU work in milliseconds: medians over samples of several calls, and times per kernel."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

__all__ = [
    "TIMING",
    "Times",
    "fit_growth",
    "graphed",
    "peak_memory",
    "split_by_kernel",
    "summarise",
    "synchronize",
    "time_calls",
    "time_once",
]

TIMING = (
    "ms: median over samples of the mean time per call in a sample, after a warm-up; q1 and q3: quartiles. On CUDA, "
    "measured between two events, with the L2 cache overwritten before each sample; elsewhere, with the clock."
)
_SAMPLE_MS = 20.0  # target duration of a sample; sets its number of calls
_MAX_CALLS = 20
_BUDGET_MS = 10_000.0  # the number of samples is reduced, down to 3, to stay within this time
_T = TypeVar("_T")


@dataclass(frozen=True)
class Times:
    """Milliseconds per call."""

    ms: float
    q1: float
    q3: float
    least: float
    samples: int
    calls: int  # per sample

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def summarise(samples: Sequence[float], calls: int = 1) -> Times:
    """Median and quartiles of milliseconds per call.

    Raises: ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples to summarise")
    several = list(samples) * (2 if len(samples) == 1 else 1)
    q1, median, q3 = statistics.quantiles(several, n=4, method="inclusive")
    return Times(median, q1, q3, min(samples), len(samples), calls)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(call: Callable[[], _T], device: torch.device) -> tuple[_T, float]:
    """Result of a call and its seconds by the clock, including compilation, autotuning and plans of a first call."""
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - began


def time_calls(
    call: Callable[[], Any],
    device: torch.device,
    *,
    samples: int,
    warm_up_ms: float = 200.0,
    max_calls: int = _MAX_CALLS,
) -> Times:
    """Time a call that has run at least once before, so that nothing is compiled here.

    Args:
        samples: number of samples; reduced, but to at least 3, if they would take more than ten seconds.
        warm_up_ms: duration of the warm-up, in which GPU clocks rise.
        max_calls: maximum number of calls per sample.
    """
    flush = _l2_flusher(device)
    once, spent = 0.0, 0.0
    while spent < warm_up_ms or not once:
        once = _sample(call, device, 1)
        spent += once
    calls = max(1, min(max_calls, round(_SAMPLE_MS / max(once, 1e-6))))
    affordable = int(_BUDGET_MS / max(once * calls, 1e-6))
    taken = []
    for _ in range(min(samples, max(3, affordable))):
        flush()
        taken.append(_sample(call, device, calls))
    return summarise(taken, calls)


def graphed(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Capture a call, which has run before, as a CUDA graph. Replaying it has almost no launch overhead, however many
    kernels it has, so that only GPU time remains."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device):
        with torch.cuda.stream(stream):
            call()  # initialises per-stream state before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    return graph.replay


def fit_growth(points: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """Exponent e of y ~ xᵉ, by least squares on the logarithms, and the range of x; None for fewer than 3 sizes x."""
    if len({x for x, _ in points}) < 3:
        return None
    xs, ys = zip(*points, strict=True)
    slope = statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope
    return {"exponent": slope, "from": min(xs), "to": max(xs), "sizes": len(set(xs))}


def _sample(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Mean milliseconds per call over ``calls`` consecutive calls."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) * 1e3 / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / calls


def _l2_flusher(device: torch.device) -> Callable[[], Any]:
    """Function that overwrites the L2 cache with other data."""
    if device.type != "cuda":
        return lambda: None
    size = 4 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer.zero_


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak bytes allocated by a call, including its result; None if the device is not CUDA."""
    if device.type != "cuda":
        call()
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def split_by_kernel(call: Callable[[], Any], device: torch.device, most: int = 16, calls: int = 3) -> dict[str, float]:
    """Milliseconds per call and kernel (on the CPU, per operator), the largest ``most`` first; the rest as "other".

    Kernels with the same name are added up. The difference to the time of the call is gaps between kernels.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        for _ in range(calls):
            call()
        synchronize(device)
    total: dict[str, float] = {}
    for event in profiled.events() or ():
        if on_gpu and event.device_type == DeviceType.CUDA:
            name, ms = _short_name(event.name), event.time_range.elapsed_us() / 1e3
        elif not on_gpu:
            name, ms = event.name, event.self_cpu_time_total / 1e3
        else:
            continue
        total[name] = total.get(name, 0.0) + ms / calls
    largest = dict(sorted(total.items(), key=lambda item: -item[1])[:most])
    rest = sum(total.values()) - sum(largest.values())
    return {**largest, **({"other": rest} if len(total) > most else {})}


def _short_name(name: str) -> str:
    """Kernel name without return type, namespaces, template arguments and parameters."""
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    while (shorter := re.sub(r"<[^<>]*>", "", name)) != name:
        name = shorter
    name = name.partition("(")[0].split()[-1] if name.strip() else "?"
    return name.rpartition("::")[2][:80] or "?"
