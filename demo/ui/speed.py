"""Benchmark of one attention call against the number of tokens, dense and with each mechanism, on this machine."""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.bench.cases import Case
from dit_accel.bench.results import Row, about
from dit_accel.bench.timing import TIMING, time_calls, time_once
from dit_accel.common.errors import BadInput
from dit_accel.common.files import replacing, write_json
from dit_accel.comparison.step_timer import synchronize
from dit_accel.layout import TokenLayout
from dit_accel.mechanisms.registry import PROCESSORS, untrained_mechanisms

from .engine import Stop
from .plots import label_of, speed_figure, two_digits

__all__ = [
    "DENSE",
    "BreakEven",
    "Plan",
    "Speed",
    "break_even",
    "check_plan",
    "measure",
]

DENSE = "dense"
_GRID_SIDES = {
    "image": (16, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    "video": (8, 12, 16, 20, 24, 32, 40, 48, 64, 80),
}
_MAX_BYTES = 2 << 30  # of query, key, value and output together
_SAMPLE_SECONDS = 0.5
_MIN_PROCESSOR_SHARE = 0.8  # below it, a warning is shown
_MIN_CALLS = 5  # minimum calls per measurement: the first, a warm-up and three samples
_FIGURES = (
    f"{TIMING} A call is the attention function on random query, key and value of shape (1, heads, tokens, head_dim), "
    "views of (1, tokens, heads, head_dim) as models have them, without gradients; selection, linear branch and "
    "learned projection included. dense: torch's scaled_dot_product_attention on the same tensors. first_call_s: the "
    "first call, with compilation and planning. logit_fraction: computed softmax logits as a share of dense "
    "attention's. break_even: number of tokens from which a mechanism is faster than dense at each measured size, "
    "interpolated between the two sizes around it on logarithmic axes. cpu_share: processor time of the calls, divided "
    "by wall time and number of threads. processor_share: its median over dense attention's sizes of at least 1,000 "
    "tokens; a value well below 1 means that other processes disturbed the times."
)


@dataclass(frozen=True)
class Plan:
    """Options of the benchmark. kind: "image" or "video" grids. share: share of the logits (except LLSA's)."""

    kind: str = "image"
    heads: int = 2
    head_dim: int = 64
    share: float = 0.1
    seconds: float = 60.0
    mechanisms: tuple[str, ...] = field(default_factory=lambda: tuple(untrained_mechanisms()))


def check_plan(plan: Plan) -> None:
    """Validate a plan.

    Raises: BadInput: a value that has to be changed.
    """
    limits = {"heads": (1, 64), "head_dim": (16, 256), "share": (0.01, 0.9), "seconds": (5, 600)}
    words = {"head_dim": "size of a head", "share": "share of the logits", "seconds": "time limit", "heads": "heads"}
    for name, (low, high) in limits.items():
        value = getattr(plan, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise BadInput(f"{words[name].capitalize()}: give a number from {low} to {high}, got {value}.")
        if name in ("heads", "head_dim") and value != int(value):
            raise BadInput(f"{words[name].capitalize()}: give an integer, got {value}.")
    if plan.kind not in _GRID_SIDES:
        raise BadInput(f"Grid: choose one of {', '.join(_GRID_SIDES)}.")
    if not plan.mechanisms:
        raise BadInput("Choose at least one mechanism to compare with dense attention.")
    known = untrained_mechanisms()
    unknown = [name for name in plan.mechanisms if name not in known]
    if unknown:
        raise BadInput(f"Unknown mechanism {unknown[0]!r}: choose from {', '.join(known)}.")


def _layouts(plan: Plan, dtype: torch.dtype) -> Iterator[TokenLayout]:
    """Grids of increasing size, while their tensors take at most 2 GiB."""
    for side in _GRID_SIDES[plan.kind]:
        layout = TokenLayout((side, side) if plan.kind == "image" else (side // 2, side, side))
        if 4 * layout.seq_len * plan.heads * plan.head_dim * dtype.itemsize > _MAX_BYTES:
            return
        yield layout


def _case(plan: Plan, name: str, layout: TokenLayout) -> Case:
    kind = PROCESSORS[name]
    options = kind.suggest(layout.grid, plan.share)
    learned = {key: tuple(x.shape) for key, x in kind(**options).initial_parameters(plan.head_dim).items()}
    return Case(name, name, name, plan.heads, plan.head_dim, layout, options, None, learned)


class _Budget:
    """Time limit, and prediction of whether the next measurement of a series fits into it."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.rows: dict[str, list[Row]] = {}

    def add(self, row: Row) -> None:
        self.rows.setdefault(row["attention"], []).append(row)

    def allows(self, name: str, tokens: int) -> bool:
        left = self.end - time.monotonic()
        rows = self.rows.get(name)
        if not rows:
            return left > 0
        expected = rows[-1]["ms"] / 1e3 * (tokens / rows[-1]["tokens"]) ** self._exponent(name)
        return _MIN_CALLS * expected < left

    def _exponent(self, name: str) -> float:
        """Growth of the time with the tokens: 2 for dense attention, else from the last two measurements."""
        if name == DENSE or len(self.rows[name]) < 2:
            return 2.0
        before, last = self.rows[name][-2:]
        growth = math.log(last["ms"] / before["ms"]) / math.log(last["tokens"] / before["tokens"])
        return min(max(growth, 1.0), 2.0)


@torch.no_grad()
def measure(plan: Plan, device: torch.device, dtype: torch.dtype, stop: Stop) -> Iterator[Row]:
    """Yield a row after each measurement, the smallest grid first, until the time limit.

    A series ends if its next size would exceed the remaining time, or the memory (the row then has status "failed").

    Raises: Cancelled: ``stop`` was set. BadInput: a plan that cannot be measured.
    """
    check_plan(plan)
    budget = _Budget(plan.seconds)
    series = [DENSE, *plan.mechanisms]
    for layout in _layouts(plan, dtype):
        series = [name for name in series if budget.allows(name, layout.seq_len)]
        if not series:
            return
        tensors = _case(plan, untrained_mechanisms()[0], layout).inputs(device, dtype, "tokens-first", seed=0)
        for name in list(series):
            stop.check()
            if not budget.allows(name, layout.seq_len):
                continue
            row = _measure(plan, name, layout, tensors)
            if row["status"] == "failed":
                series.remove(name)
            else:
                budget.add(row)
            yield row


def _measure(plan: Plan, name: str, layout: TokenLayout, tensors: Sequence[Tensor]) -> Row:
    device, dtype = tensors[0].device, tensors[0].dtype
    row: Row = {"attention": name, "tokens": layout.seq_len, "grid": list(layout.grid)}
    call: Callable[[], Tensor]
    if name == DENSE:
        query, key, value = tensors
        row |= {"options": {}, "logit_fraction": 1.0}
        call = partial(F.scaled_dot_product_attention, query, key, value)
    else:
        case = _case(plan, name, layout)
        options = {key: list(x) if isinstance(x, tuple) else x for key, x in case.options.items()}
        row |= {"options": options, "logit_fraction": case.fraction}
        call = partial(case.call, tensors, case.parameters(device, dtype, seed=0), None)
    try:
        return row | {"status": "complete"} | _time(call, device)
    except (torch.OutOfMemoryError, MemoryError):
        return row | {"status": "failed", "error": "out of memory"}


def _time(call: Callable[[], Tensor], device: torch.device) -> Row:
    """Time a call. On MPS, which is timed by the host's clock, each call is synchronized."""

    def synchronized_call() -> None:
        call()
        synchronize(device)

    timed_call = synchronized_call if device.type == "mps" else call
    _, first = time_once(timed_call, device)
    samples = max(3, min(15, int(_SAMPLE_SECONDS / max(first, 1e-6))))
    wall, cpu = time.perf_counter(), time.process_time()
    times = time_calls(timed_call, device, samples=samples, warm_up_ms=50)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    share = {"cpu_share": cpu / (wall * torch.get_num_threads())} if device.type == "cpu" else {}
    return {"first_call_s": first, **times.as_row(), **share}


@dataclass(frozen=True)
class BreakEven:
    """Number of tokens from which a mechanism is faster than dense attention.

    tokens: None if the mechanism is slower at the largest size. slower, faster: measured sizes around the break-even;
    slower is None if the mechanism is faster from the smallest size on.
    """

    tokens: float | None
    ms: float | None
    slower: int | None
    faster: int | None
    largest: int  # largest size measured for both
    times_dense: float  # dense attention's time divided by the mechanism's at that size


def break_even(rows: Sequence[Row], name: str) -> BreakEven | None:
    """Break-even of a mechanism; None if no size was measured for both it and dense attention."""
    dense, own = ({row["tokens"]: row["ms"] for row in _complete(rows, which)} for which in (DENSE, name))
    sizes = sorted(set(dense) & set(own))
    if not sizes:
        return None
    ahead = [math.log(dense[n] / own[n]) for n in sizes]
    first = next((i for i in range(len(sizes)) if all(x > 0 for x in ahead[i:])), None)
    end = {"largest": sizes[-1], "times_dense": math.exp(ahead[-1])}
    if first is None:
        return BreakEven(None, None, sizes[-1], None, **end)
    if first == 0:
        return BreakEven(float(sizes[0]), own[sizes[0]], None, sizes[0], **end)
    below, above = sizes[first - 1], sizes[first]
    weight = -ahead[first - 1] / (ahead[first] - ahead[first - 1])
    between = [_interpolate_log(x[below], x[above], weight) for x in ({n: n for n in sizes}, dense)]
    return BreakEven(between[0], between[1], below, above, **end)


def _processor_share(rows: Sequence[Row]) -> float | None:
    """Processor time of dense attention's threads as a share of the available time; None if it was not measured.

    Median over sizes of at least 1,000 tokens, which keep all threads busy. Other processes reduce it.
    """
    shares = [row["cpu_share"] for row in _complete(rows, DENSE) if row["tokens"] >= 1000 and "cpu_share" in row]
    return statistics.median(shares) if shares else None


def _interpolate_log(a: float, b: float, weight: float) -> float:
    return math.exp(math.log(a) + weight * (math.log(b) - math.log(a)))


def _complete(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["attention"] == name and row["status"] == "complete"]


@dataclass
class Speed:
    """Results of a benchmark. status: running, complete or cancelled."""

    plan: Plan
    device: torch.device
    dtype: torch.dtype
    rows: list[Row] = field(default_factory=list)
    status: str = "running"
    about: Row = field(init=False)

    def __post_init__(self) -> None:
        self.about = about(self.device, self.dtype, ["dit-accel", "demo"])

    @property
    def points(self) -> Mapping[str, BreakEven]:
        found = {name: break_even(self.rows, name) for name in self.plan.mechanisms}
        return {name: point for name, point in found.items() if point is not None}

    def figure(self) -> Any:
        return speed_figure(self.rows, self.points, self._subtitle())

    def _subtitle(self) -> str:
        machine = self.about["machine"]
        count = machine["threads"]
        threads = f", {count} thread{'s' if count > 1 else ''}" if self.device.type == "cpu" else ""
        heads = f"{self.plan.heads} head{'s' if self.plan.heads > 1 else ''} of {self.plan.head_dim}"
        return f"{machine['device_name']}{threads} · {machine['dtype']} · {heads} · {self.plan.kind} grid"

    def sentences(self) -> list[str]:
        """Summary, one sentence per mechanism."""
        return (
            [_sentence(label_of(name), point) for name, point in self.points.items()]
            + [
                f"{label_of(row['attention'])}: {row['error']} at {row['tokens']:,} tokens."
                for row in self.rows
                if row["status"] == "failed"
            ]
            + self._warnings()
        )

    def _warnings(self) -> list[str]:
        share = _processor_share(self.rows)
        if share is None or share >= _MIN_PROCESSOR_SHARE:
            return []
        return [
            f"Do not rely on these times: other processes kept this machine busy. Dense attention's threads got "
            f"{100 * share:.0f} % of the available processor time."
        ]

    def content(self) -> dict[str, Any]:
        """Content of the JSON file."""
        return {
            "kind": "speed",
            "status": self.status,
            **self.about,
            "plan": asdict(self.plan) | {"mechanisms": list(self.plan.mechanisms)},
            "figures": _FIGURES,
            "processor_share": _processor_share(self.rows),
            "break_even": {name: asdict(point) for name, point in self.points.items()},
            "rows": self.rows,
        }

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write ``speed.png`` and ``speed.json`` to a new folder inside ``folder``; on an error, neither."""
        own = Path(tempfile.mkdtemp(prefix="speed-", dir=folder))
        picture, data = own / "speed.png", own / "speed.json"
        try:
            write_json(data, self.content())
            with replacing(picture) as temporary:
                self.figure().savefig(temporary, dpi=150, facecolor="white", metadata={"Software": None})
        except BaseException:
            shutil.rmtree(own)
            raise
        return picture, data


def _sentence(name: str, point: BreakEven) -> str:
    if point.tokens is None:
        return (
            f"{name}: no break-even within the measured sizes; at {point.largest:,} tokens it takes "
            f"{1 / point.times_dense:.1f} times as long as dense."
        )
    gain = f"at {point.largest:,} tokens it is {point.times_dense:.2f} times as fast"
    if point.slower is None:
        return f"{name}: faster than dense from the smallest size on, {point.faster:,} tokens; {gain}."
    return f"{name}: faster than dense from about {two_digits(point.tokens):,} tokens on; {gain}."
