"""Benchmark results with machine and versions, saved as JSON after each finished row."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from ..common.environment import about_machine, about_versions
from ..common.files import write_json
from ..common.signals import ignore_interrupts

__all__ = ["KEYS", "Results", "Row", "about", "now", "read_results"]

Row = dict[str, Any]
KEYS = {
    "attention": ("case", "backend"),
    "backward": ("case", "backend"),
    "quality": ("teacher", "mechanism", "training", "attention"),
    "scaling": ("case", "backend", "pass"),
    "step": ("model", "variant"),
    "train": ("model", "variant", "checkpointing"),
}  # columns that identify a row, by kind of results


def now() -> str:
    """Current UTC time, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def about(device: torch.device, dtype: torch.dtype, command: list[str]) -> dict[str, Any]:
    """Date, command, machine and versions of a run."""
    machine = about_machine(device, dtype)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "capability": list(torch.cuda.get_device_capability(device)),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        }
    return {"date": now(), "command": command, "machine": machine, "versions": about_versions()}


def _driver() -> str | None:
    """Version of the GPU driver; None if nvidia-smi is not available."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        versions = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return versions[0] if versions else None


@dataclass
class Results:
    """Rows of a benchmark.

    ``status``: running, complete, failed (at least one row) or interrupted. ``summary``: computes additional top-level
    entries from all rows.
    """

    kind: str
    path: Path
    about: dict[str, Any]
    summary: Callable[[list[Row]], Row] = lambda rows: {}
    rows: list[Row] = field(default_factory=list)
    status: str = "running"
    kept: int = 0  # number of rows from earlier results, at the start of rows

    def keep_earlier(self, path: Path, replaced: Iterable[Row]) -> None:
        """Copy the rows of earlier results, except rows that are measured again (identified by ``KEYS``).

        Raises: ValueError: results of another kind, GPU or precision, or of other versions.
        """
        earlier = read_results(path)
        ours, theirs = ({"kind": self.kind, **self.about}, earlier)
        for what in ("device_name", "dtype", "driver"):
            ours, theirs = ({**x, what: x["machine"].get(what)} for x in (ours, theirs))
        for what in ("kind", "device_name", "dtype", "driver", "versions", "smoke"):
            if theirs.get(what) != ours.get(what):
                raise ValueError(
                    f"--keep: {path} has another {what} ({theirs.get(what)}, this run {ours.get(what)}): "
                    "run without --keep"
                )
        names = itemgetter(*KEYS[self.kind])
        anew = {names(row) for row in replaced}
        self.rows += [row for row in earlier["rows"] if names(row) not in anew]
        self.kept = len(self.rows)

    def add(self, row: Row) -> None:
        """Append a finished row and save."""
        self.rows.append(row)
        self.save()

    @property
    def failed(self) -> bool:
        """Whether a row of this run failed."""
        return any(row.get("status") == "failed" for row in self.rows[self.kept :])

    @contextmanager
    def track_status(self) -> Iterator[None]:
        """Context for measuring rows; sets and saves the status at the end."""
        try:
            yield
            self.status = "failed" if self.failed else "complete"
        except KeyboardInterrupt:
            self.status = "interrupted"
            raise
        except BaseException:
            self.status = "failed"
            raise
        finally:
            with ignore_interrupts():
                self.save()

    def save(self) -> None:
        """Write the file atomically."""
        content = {"kind": self.kind, "status": self.status, **self.about, **self.summary(self.rows)}
        write_json(self.path, {**content, "rows": self.rows})


def read_results(path: Path) -> dict[str, Any]:
    """Read a file that :class:`Results` wrote.

    Raises: ValueError: the file cannot be read, or has another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read results from {path}: {error}") from None
    if not isinstance(content, dict) or content.get("kind") not in KEYS or not isinstance(content.get("rows"), list):
        raise ValueError(f"{path} was not written by dit-accel bench")
    return content
