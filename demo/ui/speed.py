"""Time of an attention call against the number of tokens, dense and with each mechanism, on this machine."""

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

from dit_accel.attn_spec import grid_defaults
from dit_accel.bench.cases import Case
from dit_accel.bench.results import Row, about
from dit_accel.bench.timing import TIMING, time_calls, time_once
from dit_accel.compare.step_timer import synchronize
from dit_accel.errors import BadInput
from dit_accel.files import replacing, write_json
from dit_accel.layout import TokenLayout

from .engine import Stop
from .plots import NAMES, speed_figure, two_digits

__all__ = [
    "DENSE",
    "MECHANISMS",
    "BreakEven",
    "Plan",
    "Speed",
    "break_even",
    "check_plan",
    "measure",
]

DENSE = "dense"
MECHANISMS = ("sla", "clear", "llsa", "gna")
_SIDES = {
    "image": (16, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    "video": (8, 12, 16, 20, 24, 32, 40, 48, 64, 80),
}
_MOST_BYTES = 2 << 30  # of query, key, value and output together
_SAMPLE_SECONDS = 0.5
_UNDISTURBED = 0.8  # of the processor time: less is said aloud
_CALLS = 5  # calls that a measurement takes at least: the first, a warm-up and three samples
_FIGURES = (
    f"{TIMING} A call is the attention function on random query, key and value of shape (1, heads, tokens, head_dim), "
    "views of (1, tokens, heads, head_dim) as models have them, without gradients; selection, linear branch and "
    "learned projection included. dense: torch's scaled_dot_product_attention on the same tensors. first_call_s: the "
    "first call, with compilation and plans. logit_fraction: softmax logits that are computed, as a share of dense "
    "attention's. break_even: tokens from which on a mechanism is faster than dense at every measured size, "
    "interpolated between the sizes around it on logarithmic axes. cpu_share: processor time of the calls over wall "
    "time and threads; processor_share: its median over dense attention's sizes of at least 1,000 tokens; well below "
    "1: other work disturbed the times."
)


@dataclass(frozen=True)
class Plan:
    """What is measured. kind: "image" or "video" grids; share: of the logits (LLSA keeps its own blocks)."""

    kind: str = "image"
    heads: int = 2
    head_dim: int = 64
    share: float = 0.1
    seconds: float = 60.0
    mechanisms: tuple[str, ...] = MECHANISMS


def check_plan(plan: Plan) -> None:
    """Raises: BadInput: what has to be changed."""
    limits = {"heads": (1, 64), "head_dim": (16, 256), "share": (0.01, 0.9), "seconds": (5, 600)}
    words = {"head_dim": "size of a head", "share": "share of the logits", "seconds": "time limit", "heads": "heads"}
    for name, (least, most) in limits.items():
        value = getattr(plan, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
            raise BadInput(f"{words[name].capitalize()}: give a number from {least} to {most}, got {value}.")
        if name in ("heads", "head_dim") and value != int(value):
            raise BadInput(f"{words[name].capitalize()}: give a whole number, got {value}.")
    if plan.kind not in _SIDES:
        raise BadInput(f"Grid: choose one of {', '.join(_SIDES)}.")
    if not plan.mechanisms:
        raise BadInput("Choose at least one mechanism to measure beside dense attention.")
    unknown = [name for name in plan.mechanisms if name not in MECHANISMS]
    if unknown:
        raise BadInput(f"There is no mechanism {unknown[0]!r}; there are: {', '.join(MECHANISMS)}.")


def _layouts(plan: Plan, dtype: torch.dtype) -> Iterator[TokenLayout]:
    """Growing grids, as long as their tensors fit."""
    for side in _SIDES[plan.kind]:
        layout = TokenLayout((side, side) if plan.kind == "image" else (side // 2, side, side))
        if 4 * layout.seq_len * plan.heads * plan.head_dim * dtype.itemsize > _MOST_BYTES:
            return
        yield layout


def _case(plan: Plan, name: str, layout: TokenLayout) -> Case:
    learned = {"weight": (plan.head_dim,) * 2, "bias": (plan.head_dim,)} if name == "sla" else {}
    options = grid_defaults(name, layout.grid, plan.share)
    return Case(name, name, name, plan.heads, plan.head_dim, layout, options, None, learned)


class _Budget:
    """Seconds that are left, and whether a series' next measurement should fit into them."""

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
        return _CALLS * expected < left

    def _exponent(self, name: str) -> float:
        """Dense attention's is known; a mechanism grows as it did last."""
        if name == DENSE or len(self.rows[name]) < 2:
            return 2.0
        before, last = self.rows[name][-2:]
        growth = math.log(last["ms"] / before["ms"]) / math.log(last["tokens"] / before["tokens"])
        return min(max(growth, 1.0), 2.0)


@torch.no_grad()
def measure(plan: Plan, device: torch.device, dtype: torch.dtype, stop: Stop) -> Iterator[Row]:
    """A row after each measurement, the smallest grid first, until the time is over.

    A series ends once its next size would not fit into the time that is left, or into memory (a row says so).

    Raises: Cancelled: ``stop`` was set. BadInput: a plan that cannot be measured.
    """
    check_plan(plan)
    budget = _Budget(plan.seconds)
    going = [DENSE, *plan.mechanisms]
    for layout in _layouts(plan, dtype):
        going = [name for name in going if budget.allows(name, layout.seq_len)]
        if not going:
            return
        tensors = _case(plan, "gna", layout).inputs(device, dtype, "tokens-first", seed=0)
        for name in list(going):
            stop.check()
            if not budget.allows(name, layout.seq_len):
                continue
            row = _measure(plan, name, layout, tensors)
            if row["status"] == "failed":
                going.remove(name)
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
    """Each call is waited for on devices whose time is taken by the clock."""

    def finished() -> None:
        call()
        synchronize(device)

    timed = finished if device.type == "mps" else call
    _, first = time_once(timed, device)
    samples = max(3, min(15, int(_SAMPLE_SECONDS / max(first, 1e-6))))
    wall, cpu = time.perf_counter(), time.process_time()
    times = time_calls(timed, device, samples=samples, warm_up_ms=50)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    share = {"cpu_share": cpu / (wall * torch.get_num_threads())} if device.type == "cpu" else {}
    return {"first_call_s": first, **times.as_row(), **share}


@dataclass(frozen=True)
class BreakEven:
    """Where a mechanism gets faster than dense attention. tokens: None where it does not within what was measured.

    slower, faster: the measured sizes around it; slower is None where it is faster from the smallest size on.
    """

    tokens: float | None
    ms: float | None
    slower: int | None
    faster: int | None
    largest: int  # the largest size that both were measured at
    times_dense: float  # dense's time over the mechanism's there


def break_even(rows: Sequence[Row], name: str) -> BreakEven | None:
    """None where the mechanism and dense attention have no measured size in common."""
    dense, ours = ({row["tokens"]: row["ms"] for row in _complete(rows, which)} for which in (DENSE, name))
    sizes = sorted(set(dense) & set(ours))
    if not sizes:
        return None
    ahead = [math.log(dense[n] / ours[n]) for n in sizes]
    first = next((i for i in range(len(sizes)) if all(x > 0 for x in ahead[i:])), None)
    end = {"largest": sizes[-1], "times_dense": math.exp(ahead[-1])}
    if first is None:
        return BreakEven(None, None, sizes[-1], None, **end)
    if first == 0:
        return BreakEven(float(sizes[0]), ours[sizes[0]], None, sizes[0], **end)
    below, above = sizes[first - 1], sizes[first]
    way = -ahead[first - 1] / (ahead[first] - ahead[first - 1])
    between = [_between(x[below], x[above], way) for x in ({n: n for n in sizes}, dense)]
    return BreakEven(between[0], between[1], below, above, **end)


def _processor_share(rows: Sequence[Row]) -> float | None:
    """Of the processor time that dense attention's threads could have had, the part that they got (median over sizes
    that keep all threads at work): less where other work goes on. None where it was not measured."""
    shares = [row["cpu_share"] for row in _complete(rows, DENSE) if row["tokens"] >= 1000 and "cpu_share" in row]
    return statistics.median(shares) if shares else None


def _between(a: float, b: float, way: float) -> float:
    return math.exp(math.log(a) + way * (math.log(b) - math.log(a)))


def _complete(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["attention"] == name and row["status"] == "complete"]


@dataclass
class Speed:
    """What was measured so far. status: running, complete or cancelled."""

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
        threads = f", {machine['threads']} threads" if self.device.type == "cpu" else ""
        heads = f"{self.plan.heads} head{'s' if self.plan.heads > 1 else ''} of {self.plan.head_dim}"
        return f"{machine['device_name']}{threads} · {machine['dtype']} · {heads} · {self.plan.kind} grid"

    def sentences(self) -> list[str]:
        """What came out, one sentence a mechanism."""
        return (
            [_sentence(NAMES[name], point) for name, point in self.points.items()]
            + [
                f"{NAMES[row['attention']]}: {row['error']} at {row['tokens']:,} tokens."
                for row in self.rows
                if row["status"] == "failed"
            ]
            + self._disturbed()
        )

    def _disturbed(self) -> list[str]:
        share = _processor_share(self.rows)
        if share is None or share >= _UNDISTURBED:
            return []
        return [
            f"Do not rely on these times: other work kept this machine busy. Dense attention's threads got {share:.0%} "
            "of the processor time that they asked for."
        ]

    def content(self) -> dict[str, Any]:
        """As JSON."""
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
        """``speed.png`` and ``speed.json`` in a new folder inside: both whole, or nothing."""
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
            f"{name}: no break-even within what was measured; at {point.largest:,} tokens it takes "
            f"{1 / point.times_dense:.1f} times as long as dense."
        )
    gain = f"at {point.largest:,} tokens it is {point.times_dense:.2f} times as fast"
    if point.slower is None:
        return f"{name}: faster than dense from the smallest size on, {point.faster:,} tokens; {gain}."
    return f"{name}: faster than dense from about {two_digits(point.tokens):,} tokens on; {gain}."
