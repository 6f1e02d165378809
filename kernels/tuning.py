"""Launch configurations of the block-sparse kernel: from a table of measurements, else from a short search at the first
call, cached on disk.

A plan is cut into tiles before any kernel runs, and SLA's blocks are chosen by the user: another tile size would need
another plan. A search therefore keeps the tile sizes of `choose_config`, and varies what does not affect the plan:
warps, stages, loads by descriptor or by pointers, registers. ``DIT_ACCEL_AUTOTUNE=0`` uses the first guess instead.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from .launch import has_large_shared_memory

__all__ = ["LaunchConfig", "choose_config", "launch_tuned", "measured"]

KERNEL = 2  # increase it when the kernel changes: older measurements are then ignored
MAX_CONFIGS = 6
BUDGET_S = 20.0  # no further candidate is started after this
RUNS = 5  # timed runs per candidate
GAIN = 0.97  # a candidate must stay under this fraction of the guess's time: the rest is noise
SWITCH, FOLDER = "DIT_ACCEL_AUTOTUNE", "DIT_ACCEL_CACHE"
LOG = logging.getLogger("dit_accel")


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration of the kernel: maximum rows of a tile, warps, stages of the pipeline, tiles by tensor
    descriptor, maximum registers per thread (so that two programs share a multiprocessor)."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    boxes: bool = False
    max_registers: int | None = None

    def __str__(self) -> str:
        limit = "" if self.max_registers is None else f", at most {self.max_registers} registers"
        return f"{self.num_warps} warps, {self.num_stages} stages, {'boxes' if self.boxes else 'pointers'}{limit}"


class Measured(NamedTuple):
    """Row of the table: the case that was measured, and its best configuration."""

    capability: tuple[int, int]
    kind: str
    itemsize: int
    dims: range
    config: LaunchConfig


# The fastest of seven each on an H100 (16-bit, D = 128), by the kind of mask of a plan. At 128 registers per thread two
# programs share a multiprocessor, and one's softmax overlaps the other's matrix products.
HOPPER = {
    "list": LaunchConfig(128, 64, 8, 3, True, 128),
    "interval": LaunchConfig(128, 64, 8, 2, True, 128),
    "ball": LaunchConfig(128, 64, 8, 2, True, 128),
}
TABLE = [Measured((9, 0), kind, 2, range(128, 129), config) for kind, config in HOPPER.items()]

_chosen: dict[str, LaunchConfig] = {}
_lock = Lock()


def measured(query: Tensor, kind: str) -> LaunchConfig | None:
    """Entry of `TABLE` for this GPU, kind of plan, dtype and head dim, or None."""
    if query.device.type != "cuda" or torch.version.hip:
        return None
    wanted = (torch.cuda.get_device_capability(query.device), kind, query.element_size())
    return next((row.config for row in TABLE if row[:3] == wanted and query.shape[-1] in row.dims), None)


def choose_config(query: Tensor, kind: str) -> LaunchConfig:
    """Configuration from the table, else a guess that fits the shared memory of every GPU of its class."""
    if known := measured(query, kind):
        return known
    if query.dtype == torch.float32:
        return LaunchConfig(32, 32, 8, 1) if query.shape[-1] > 64 else LaunchConfig(64, 32, 8, 1)
    if query.shape[-1] > 128:
        return LaunchConfig(64, 32, 8, 1)
    return HOPPER[kind] if has_large_shared_memory(query) else LaunchConfig(64, 64, 4, 2)  # fits Ada's 99 KiB


def candidate_configs(guess: LaunchConfig, itemsize: int, boxes: bool) -> list[LaunchConfig]:
    """The guess and alternatives with the same tile sizes; ``boxes``: whether descriptors are supported."""
    candidates: list[tuple[int, int, bool, int | None]]
    if torch.version.hip:
        candidates = [
            (4, 1, False, None),
            (8, 1, False, None),
            (4, 2, False, None),
            (8, 2, False, None),
            (2, 1, False, None),
        ]
    elif itemsize > 2:
        candidates = [
            (4, 1, False, None),
            (4, 2, False, None),
            (8, 1, False, None),
            (8, 2, False, None),
            (2, 1, False, None),
        ]
    else:
        candidates = [
            (8, 2, boxes, 128),
            (8, 3, boxes, 128),
            (4, 2, boxes, None),
            (8, 2, boxes, None),
            (4, 3, boxes, None),
        ]
        candidates += [(8, 2, False, 128), (4, 1, boxes, None)]
    found = [replace(guess, num_warps=w, num_stages=s, boxes=b, max_registers=r) for w, s, b, r in candidates]
    return list(dict.fromkeys([guess, *found]))[:MAX_CONFIGS]


def launch_tuned(
    launch: Callable[[LaunchConfig], None], query: Tensor, what: str, guess: LaunchConfig, boxes: bool
) -> None:
    """Launch the kernel in its fastest configuration for ``what``. The first call of a kind on a GPU measures a few
    configurations on the caller's tensors and logs the result; not in the interpreter, off the GPU, or during the
    capture of a CUDA graph.

    Args:
        launch: runs the kernel with a configuration and overwrites its outputs.
        query: gives dtype, head dim and device.
        what: the kind of plan and everything else that affects which configuration is fastest.
        guess: used if no measurement is available or possible.
        boxes: whether tiles can be loaded by descriptor.
    Raises: OutOfResources: no configuration fits the GPU.
    """
    gpu = _gpu(query.device)
    if gpu is None or os.environ.get(SWITCH, "").lower() in ("0", "false", "no", "off"):
        return launch(guess)
    guess = replace(guess, boxes=guess.boxes and boxes)
    case = f"{what}, {str(query.dtype).removeprefix('torch.')}, head dim {query.shape[-1]}"
    key = f"{gpu}, triton {triton.__version__}, kernel {KERNEL}: {case}"
    config = _chosen.get(key) or _choose(launch, key, candidate_configs(guess, query.element_size(), boxes))
    try:
        launch(config)
    except OutOfResources:
        if config == guess:
            raise
        _chosen[key] = guess  # it was measured in a call that needed less
        launch(guess)


@cache
def _gpu(device: torch.device) -> str | None:
    """Name of the GPU; None if timing is impossible."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return None
    return torch.cuda.get_device_name(device)


def _choose(launch: Callable[[LaunchConfig], None], key: str, candidates: list[LaunchConfig]) -> LaunchConfig:
    """Configuration from memory, else from disk, else by a search, whose result is stored in both."""
    with _lock:  # concurrent searches would slow one another down
        if key in _chosen:
            return _chosen[key]
        file = _cache_file()
        entry = _read(file).get(key)
        kept = [config for config in candidates if isinstance(entry, dict) and entry.get("config") == asdict(config)]
        if kept:
            return _chosen.setdefault(key, kept[0])
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        LOG.warning(
            "Autotuning an attention kernel: measuring %d launch configurations once, for at most about %.0f s (%s). "
            "The fastest is stored in %s; %s=0 turns this off.", len(candidates), BUDGET_S, key, file, SWITCH,
        )  # fmt: skip
        start = perf_counter()
        times = _search(launch, candidates)
        best = min(times, key=times.__getitem__)
        if times[best] > GAIN * times.get(candidates[0], float("inf")):
            best = candidates[0]
        untuned = f"{times[candidates[0]]:.3g} ms" if candidates[0] in times else "does not fit"
        LOG.warning(
            "Measured %d in %.1f s; fastest: %s, %.3g ms per call (untuned: %s).",
            len(times), perf_counter() - start, best, times[best], untuned,
        )  # fmt: skip
        _chosen[key] = best
        _write(file, key, {"config": asdict(best), "ms": round(times[best], 5)})
        return best


def _search(launch: Callable[[LaunchConfig], None], candidates: list[LaunchConfig]) -> dict[LaunchConfig, float]:
    """Milliseconds of each configuration that fits, until the budget is spent.

    Raises: OutOfResources, PTXASError: none fits; the error of the first.
    """
    start = perf_counter()
    times: dict[LaunchConfig, float] = {}
    refusals: list[Exception] = []
    for config in candidates:
        if times and perf_counter() - start > BUDGET_S:
            break
        try:
            times[config] = _milliseconds(partial(launch, config))
        except (OutOfResources, PTXASError) as error:
            refusals.append(error)
    if not times:
        raise refusals[0]
    return times


def _milliseconds(call: Callable[[], None]) -> float:
    """Median time of a call on the current stream, after one that compiles."""
    call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    return sorted(a.elapsed_time(b) for a, b in pairwise(marks))[RUNS // 2]


def _cache_file() -> Path:
    folder = os.environ.get(FOLDER) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dit_accel")
    return Path(os.path.expanduser(folder)) / "tuning.json"


def _read(file: Path) -> dict[str, Any]:
    """Content of the cache file; empty if it does not exist or, with a warning, if it is not valid."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn_once(f"Ignoring {file}, the cache of tuned kernels: {error}")
        return {}
    return content


def _write(file: Path, key: str, entry: dict[str, Any]) -> None:
    """Add an entry to the cache file. The file is replaced atomically: of two processes that write at the same moment
    one may lose its entry, and measures again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {**_read(file), key: entry}
        handle, temporary = tempfile.mkstemp(prefix=".tuning.", suffix=".json", dir=file.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump(content, out, indent=1, sort_keys=True)
            os.replace(temporary, file)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        _warn_once(f"Cannot store tuned kernels in {file}, so each process autotunes again: {error}")


@cache
def _warn_once(message: str) -> None:
    LOG.warning(message)
