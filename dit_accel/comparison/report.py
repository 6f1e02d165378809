"""Results of a comparison: plain data, saved as JSON and printed as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ..common.files import write_json

__all__ = ["FIGURES", "Picture", "Report", "Variant", "figure"]

# figure -> (heading, format); None: not measured
FIGURES = {
    "seconds_per_step": ("s / step", "{:.3g}"),
    "times_dense": ("× dense", "{:.2f}×"),
    "logit_fraction": ("logits", "{:.1%}"),
    "psnr": ("PSNR dB", "{:.1f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "lpips": ("LPIPS", "{:.3f}"),
}


def figure(name: str, value: float | None) -> str:
    """Format a figure; a dash if it was not measured."""
    return "–" if value is None else FIGURES[name][1].format(value)


@dataclass
class Picture:
    """A picture of one prompt by one variant, with its metrics against the dense picture with the same seed."""

    prompt: int
    file: str
    seconds_per_step: float
    times_dense: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None


@dataclass
class Variant:
    """Dense attention, or a mechanism with its options.

    ``source``: folder, file or hub id of trained attention. ``status``: waiting, running, complete, failed or
    interrupted.
    """

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    short: str = ""
    source: str | None = None
    status: str = "waiting"
    error: str | None = None
    logit_fraction: float | None = None
    installed: str | None = None
    pictures: list[Picture] = field(default_factory=list)

    def mean(self, name: str) -> float | None:
        """Mean of a figure over the pictures that have it."""
        if name == "logit_fraction":
            return self.logit_fraction
        values = [value for picture in self.pictures if (value := getattr(picture, name)) is not None]
        return statistics.fmean(values) if values else None

    def picture(self, prompt: int) -> Picture | None:
        return next((picture for picture in self.pictures if picture.prompt == prompt), None)


@dataclass
class Report:
    """Results of a comparison, dense first. ``status``: running, complete, failed or interrupted."""

    path: Path
    about: Mapping[str, Any]
    prompts: list[str]
    variants: list[Variant]
    status: str = "running"
    files: dict[str, str] = field(default_factory=dict)
    dense_again: float | None = None  # seconds per step of dense, measured again at the end

    def drift(self) -> float | None:
        """Time of dense at the end over its time at the beginning; differs from 1 if the machine had other load."""
        first = self.variants[0].mean("seconds_per_step")
        return self.dense_again / first if first and self.dense_again else None

    def missing(self) -> list[dict[str, Any]]:
        """Requested pictures that do not exist."""
        return [
            {"attention": variant.label, "prompt": prompt, "status": variant.status}
            for variant in self.variants
            for prompt in range(len(self.prompts))
            if variant.picture(prompt) is None
        ]

    def content(self) -> dict[str, Any]:
        """The report as JSON-compatible data."""
        return {
            "status": self.status,
            "missing": self.missing(),
            **self.about,
            "prompts": self.prompts,
            "files": self.files,
            "dense_again": {"seconds_per_step": self.dense_again, "over_first": self.drift()},
            "attention": [
                {**asdict(variant), "mean": {name: variant.mean(name) for name in FIGURES}} for variant in self.variants
            ],
        }

    def save(self) -> None:
        """Write the report atomically."""
        write_json(self.path, self.content())

    def table(self) -> Table:
        """Table with one row per variant and means over the prompts."""
        shown = [name for name in FIGURES if name != "lpips" or any(v.mean("lpips") is not None for v in self.variants)]
        table = Table(title=f"{self.about['pipeline']['class']}, mean of {len(self.prompts)} prompt(s)")
        table.add_column("attention")
        for name in shown:
            table.add_column(FIGURES[name][0], justify="right")
        for variant in self.variants:
            note = "" if variant.status == "complete" else f" ({variant.status})"
            head = f"{variant.label}{note}\n[dim]{variant.short.replace(',', ', ')}[/dim]"
            table.add_row(head, *(figure(name, variant.mean(name)) for name in shown))
        return table
